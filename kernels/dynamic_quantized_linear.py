"""A projection in 8 bits: the weight is int8 with a scale for each output, x is quantized as it comes.

    step = max((max(x, 0) - min(x, 0)) / 255, 1e-30)      a step and a zero for each row of x
    zero = round(-min(x, 0) / step)
    codes = clamp(round(x / step) + zero, 0, 255)
    out = activation(((codes - zero) @ weight.T) * step * scale + bias)

Each row has a step of its own, so that what comes out for a token does not depend on what else is in the
batch, and one large value costs its own row its precision and no other. For the trained MiniLM, every layer
quantized, the outputs are 6 % off that way and 17 % with one step for all of x.

The codes of x are unsigned and those of the weight signed, which is what VNNI and AMX multiply. A processor
without either adds pairs of such products in 16 bits, which saturate: there the weight must stay within 64.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference (arXiv:1712.05877), section 2; a step a row as in Yao et al., ZeroQuant (arXiv:2206.01861).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.ir.tuning import Tuning, spelled
from graphopt.kernels._activations import TORCH, finished, require_known
from graphopt.kernels._onnx import Value, dequantized, emit, linear, op
from graphopt.kernels._shape import product_cost, require, require_floating, shape_of

SCHEMA = (
    '(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, str activation="none", float parameter=1.0)'
    " -> Tensor"
)
_MIN_STEP = 1e-30  # of a row of zeros


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (..., K), floating.
        weight: (N, K), int8.
        scale: (N,), x's dtype.
        bias: (N,), x's dtype; None for zeros.
        activation: a name of ``kernels/_activations.py``.
        parameter: of the activation, where it has one.

    Returns:
        An empty (..., N) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is unknown.
    """
    require_known("dynamic_quantized_linear", activation)
    require_floating("dynamic_quantized_linear", x=x, scale=scale, bias=bias)
    require(
        weight.dtype == torch.int8, f"dynamic_quantized_linear: weight must be torch.int8, not {weight.dtype}"
    )
    fits = x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    require(fits, f"dynamic_quantized_linear: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    for name, vector in (("scale", scale), ("bias", bias)):
        fits = vector is None or vector.shape == weight.shape[:1]
        wrong = f"{name} {shape_of(vector)} does not fit weight {shape_of(weight)}"
        require(fits, f"dynamic_quantized_linear: {wrong}")
    require(x.shape[-1] > 0, "dynamic_quantized_linear: x has no features")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    codes, step, zero = quantized_rows(x.to(wide))
    out = F.linear(codes - zero, weight_NK.to(wide)) * (step * scale_N.to(wide))
    if bias_N is not None:
        out = out + bias_N.to(wide)
    return TORCH[activation](out, parameter).to(x.dtype).contiguous()


def quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of x, from 0 to 255 and of x's type, and the step and the zero of each row, (..., 1)."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = ((high - low) / 255).clamp_min(_MIN_STEP)
    zero = (-low / step).round()
    return (x / step).round_().add_(zero).clamp_(0, 255), step, zero


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> Cost:
    """One matrix product; a byte a weight is read."""
    return product_cost(x, weight.shape, weight, scale, bias)


# Whether a product may scale as it multiplies, which only ONNX Runtime's own node does.
_SCALES: dict[Tuning, bool] = {"any": True, "portable": False}
# Whether x is left to the runtime, which quantizes it by itself before a product with a weight in 8 bits.
_QUANTIZES: dict[Tuning, bool] = {"any": False, "openvino": True}


def _onnx(
    x: Value,
    weight: Value,
    scale: Value,
    bias: Value | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> Any:
    """MatMulIntegerToFloat, which scales as it multiplies; x is quantized, and corrected for, in plain nodes.

    Where that is not to be had, MatMulInteger and a product with the scale.

    At (128, 3072) by 768 the whole takes 1.98 ms, DynamicQuantizeMatMul with its one step for all of x 1.50
    ms, MatMulNBits in 8 bits 6.1 ms and Gemm in float32 more than 6 ms (ONNX Runtime 1.31, one thread of a
    CPU with AVX-512 and VNNI). Both corrections, for the zeros and for the bias, are one product of rank 2.
    """
    given, kind = x.dtype, ir.DataType.FLOAT
    x, scale, bias = (
        v if v is None or v.dtype == kind else op.Cast(v, to=int(kind)) for v in (x, scale, bias)
    )
    if spelled(_QUANTIZES):
        out = linear(x, dequantized(weight, scale), bias)
        return finished(out, activation, parameter, given)
    features = op.Shape(weight, start=1, end=2)
    rows = op.Reshape(x, op.Concat(op.Constant(value_ints=[-1]), features, axis=0))
    last, nothing = op.Constant(value_ints=[1]), op.Constant(value_float=0.0)
    low = op.Min(op.ReduceMin(rows, last, keepdims=1), nothing)
    high = op.Max(op.ReduceMax(rows, last, keepdims=1), nothing)
    step = op.Div(op.Sub(high, low), op.Constant(value_float=255.0))
    step = op.Max(step, op.Constant(value_float=_MIN_STEP))
    below = op.Round(op.Div(low, step))  # the zero, negated
    codes = op.Sub(op.Round(op.Div(rows, step)), below)
    codes = op.Cast(op.Clip(codes, nothing, op.Constant(value_float=255.0)), to=int(ir.DataType.UINT8))
    one = op.Constant(value_float=1.0)
    if spelled(_SCALES):
        product = emit("MatMulIntegerToFloat", codes, op.Transpose(weight, perm=[1, 0]), one, scale)
    else:
        sums = op.MatMulInteger(codes, op.Transpose(weight, perm=[1, 0]))
        product = op.Mul(op.Cast(sums, to=int(kind)), scale)
    sums = op.Mul(op.ReduceSum(op.Cast(weight, to=int(kind)), last, keepdims=0), scale)
    bias = op.Mul(scale, nothing) if bias is None else bias
    axis = op.Constant(value_ints=[0])
    right = op.Concat(op.Unsqueeze(sums, axis), op.Unsqueeze(bias, axis), axis=0)
    left = op.Concat(op.Mul(below, step), op.Div(step, step), axis=1)
    out = finished(op.Gemm(left, right, op.Mul(product, step)), activation, parameter, given)
    return op.Reshape(out, op.Concat(op.Shape(x, start=0, end=-1), op.Shape(scale), axis=0))


def _samples() -> Iterator[Sample]:
    weight = torch.randint(-64, 65, (20, 12), dtype=torch.int8)
    x, scale, bias = torch.randn(2, 5, 12), (torch.rand(20) + 0.5) / 64, torch.randn(20)
    yield Sample((x, weight, scale, bias), label="bias")
    yield Sample((x, weight, scale), label="no bias")
    yield Sample((x[:, 0], weight, scale, bias), label="two dimensions")
    yield Sample((1e2 * x, weight, scale, bias), label="large magnitudes")
    yield Sample((x.abs() + 1, weight, scale, bias), label="positive values")
    zeros = torch.cat([x[:, :2], torch.zeros(2, 3, 12)], dim=1)
    yield Sample((zeros, weight, scale, bias), label="rows of zeros")
    for activation in ("gelu", "relu", "quick_gelu"):
        yield Sample((x, weight, scale, bias, activation, 1.702), label=activation)


def _bad_samples() -> Iterator[BadSample]:
    x, weight, scale = torch.randn(2, 12), torch.ones(20, 12, dtype=torch.int8), torch.ones(20)
    yield BadSample((x, weight.float(), scale), match="weight must be torch.int8")
    yield BadSample((x, weight.T.contiguous(), scale), match="does not fit x")
    yield BadSample((x, weight, scale[:3]), match=r"scale \(3,\) does not fit")
    yield BadSample((x, weight, scale, scale[:3]), match=r"bias \(3,\) does not fit")
    yield BadSample((x, weight, scale, None, "swish"), match="activation is one of")


OP = register(
    Op("dynamic_quantized_linear", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples)
)
