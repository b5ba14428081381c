"""A projection in 8 bits whose steps were found beforehand: the weight is int8, x is quantized by constants.

    codes = clamp(round(x * factor) + zero_point, 0, 255)
    out = activation(((codes - zero_point) @ weight.T) * scale + bias)

There is a factor for each feature of x and one zero point for all. Features of a transformer differ in size
by orders of magnitude, always the same ones: a factor each brings them into one range, and the weight is
divided by it before it is rounded, so that nothing has to be undone behind the product.

The codes of x are unsigned and those of the weight signed, which is what VNNI and AMX multiply. A processor
without either adds pairs of such products in 16 bits, which saturate: there the weight must stay within 64.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference (arXiv:1712.05877), section 2; a factor a feature: Xiao et al., SmoothQuant (arXiv:2211.10438).
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
from graphopt.kernels._onnx import Value, dequantized, emit, op
from graphopt.kernels._shape import product_cost, require, require_floating, shape_of

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor factor, int zero_point, Tensor? bias=None, *,"
    ' str activation="none", float parameter=1.0) -> Tensor'
)


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor,
    zero_point: int,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (..., K), floating.
        weight: (N, K), int8.
        scale: (N,), x's dtype.
        factor: (K,), x's dtype.
        zero_point: the code of 0, from 0 to 255.
        bias: (N,), x's dtype; None for zeros.
        activation: a name of ``kernels/_activations.py``.
        parameter: of the activation, where it has one.

    Returns:
        An empty (..., N) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is unknown.
    """
    name = "static_quantized_linear"
    require_known(name, activation)
    require_floating(name, x=x, scale=scale, factor=factor, bias=bias)
    require(weight.dtype == torch.int8, f"{name}: weight must be torch.int8, not {weight.dtype}")
    require(0 <= zero_point <= 255, f"{name}: zero_point must be from 0 to 255, not {zero_point}")
    fits = x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    require(fits, f"{name}: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    for label, vector, size in (
        ("scale", scale, weight.shape[0]),
        ("factor", factor, weight.shape[1]),
        ("bias", bias, weight.shape[0]),
    ):
        fits = vector is None or (vector.dim() == 1 and vector.shape[0] == size)
        require(fits, f"{name}: {label} {shape_of(vector)} does not fit weight {shape_of(weight)}")
    require(x.shape[-1] > 0, f"{name}: x has no features")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor,
    factor_K: torch.Tensor,
    zero_point: int,
    bias_N: torch.Tensor | None = None,
    *,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = (x.to(wide) * factor_K.to(wide)).round_().clamp_(-zero_point, 255 - zero_point)
    out = F.linear(centred, weight_NK.to(wide)) * scale_N.to(wide)
    if bias_N is not None:
        out = out + bias_N.to(wide)
    return TORCH[activation](out, parameter).to(x.dtype).contiguous()


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor,
    zero_point: int,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    parameter: float = 1.0,
) -> Cost:
    """One matrix product; a byte a weight is read."""
    return product_cost(x, weight.shape, weight, scale, factor, bias)


# What the product of codes is: a node of ONNX Runtime's that scales as it multiplies, ONNX's own, or a
# product of numbers that OpenVINO finds to be codes.
_PRODUCT: dict[Tuning, str] = {
    "any": "MatMulIntegerToFloat",
    "portable": "MatMulInteger",
    "openvino": "MatMul",
}


def _onnx(
    x: Value,
    weight: Value,
    scale: Value,
    factor: Value,
    zero_point: int,
    bias: Value | None = None,
    *,
    activation: str = "none",
    parameter: float = 1.0,
) -> Any:
    """QuantizeLinear and MatMulIntegerToFloat, which scales and adds the bias as it multiplies.

    The factors are a product in front: QuantizeLinear with a scale a feature quantizes number by number.
    """
    given, kind = x.dtype, ir.DataType.FLOAT
    x, scale, factor, bias = (
        v if v is None or v.dtype == kind else op.Cast(v, to=int(kind)) for v in (x, scale, factor, bias)
    )
    one = op.Constant(value_float=1.0)
    zero = op.Constant(value=ir.tensor(zero_point, dtype=ir.DataType.UINT8))
    codes, product = op.QuantizeLinear(op.Mul(x, factor), one, zero), spelled(_PRODUCT)
    if product == "MatMulIntegerToFloat":
        more = (zero,) if bias is None else (zero, None, bias)
        out = emit(product, codes, op.Transpose(weight, perm=[1, 0]), one, scale, *more)
        return finished(out, activation, parameter, given)
    if product == "MatMulInteger":
        columns = op.Transpose(weight, perm=[1, 0])
        out = op.Mul(op.Cast(op.MatMulInteger(codes, columns, zero), to=int(kind)), scale)
    else:
        numbers = op.Transpose(dequantized(weight, scale), perm=[1, 0])
        out = op.MatMul(op.DequantizeLinear(codes, one, zero), numbers)
    out = out if bias is None else op.Add(out, bias)
    return finished(out, activation, parameter, given)


def _samples() -> Iterator[Sample]:
    weight = torch.randint(-64, 65, (20, 12), dtype=torch.int8)
    x, scale, bias = torch.randn(2, 5, 12), (torch.rand(20) + 0.5) / 2**11, torch.randn(20)
    factor = 2.0 ** torch.randint(3, 7, (12,))
    given = (weight, scale, factor, 120)
    yield Sample((x, *given, bias), label="bias")
    yield Sample((x, *given), label="no bias")
    yield Sample((x[:, 0], *given, bias), label="two dimensions")
    yield Sample((1e2 * x, *given, bias), label="numbers out of range")
    yield Sample((x.abs(), weight, scale, factor, 0, bias), label="positive numbers")
    for activation in ("gelu", "relu", "quick_gelu"):
        options = {"activation": activation, "parameter": 1.702}
        yield Sample((x, *given, bias), options, label=activation)


def _bad_samples() -> Iterator[BadSample]:
    x, weight, scale = torch.randn(2, 12), torch.ones(20, 12, dtype=torch.int8), torch.ones(20)
    given, factor = (weight, scale), torch.ones(12)
    yield BadSample((x, weight.float(), scale, factor, 0), match="weight must be torch.int8")
    yield BadSample((x, weight.T.contiguous(), scale, factor, 0), match="does not fit x")
    yield BadSample((x, weight, scale[:3], factor, 0), match=r"scale \(3,\) does not fit")
    yield BadSample((x, *given, scale, 0), match=r"factor \(20,\) does not fit")
    yield BadSample((x, *given, factor, 256), match="zero_point must be from 0 to 255, not 256")
    yield BadSample((x, *given, factor, -1), match="zero_point must be from 0 to 255, not -1")
    yield BadSample((x, *given, factor, 0, scale[:3]), match=r"bias \(3,\) does not fit")
    yield BadSample((x, *given, factor, 0), {"activation": "swish"}, match="activation is one of")


OP = register(Op("static_quantized_linear", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
