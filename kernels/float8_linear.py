"""A projection of rows in 8 bits: both factors are float8_e4m3fn, with a scale for each row and each output.

    out = act((codes @ weight.T) * scale * weight_scale + bias)

``quantize_rows`` makes the codes and scales of the rows; they are an op of their own, so that projections of
one value share them. Products of codes are summed in float32, and what scales, bias and activation make of
the sums is rounded once, to ``dtype``.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._activations import TORCH, finished, require_known
from graphopt.kernels._float8_triton import float8_product, refuse_float8
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._shape import product_cost, require, require_floating, shape_of
from graphopt.kernels.quantize_rows import OP as QUANTIZE_ROWS

SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, ScalarType dtype, Tensor? bias=None,"
    ' str activation="none", float parameter=1.0) -> Tensor'
)


def _shape(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    """The shape rule.

    Args:
        codes: (..., K), float8_e4m3fn; or the same numbers in float64, as a reference is computed.
        scale: (..., 1), floating.
        weight: (N, K), the dtype of the codes.
        weight_scale: (N,), floating.
        dtype: of the result, floating.
        bias: (N,), floating; None for zeros.
        activation: a name of ``kernels/_activations.py``.
        parameter: of the activation, where it has one.

    Returns:
        An empty (..., N) of that dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is unknown.
    """
    name = "float8_linear"
    require_known(name, activation)
    known = codes.dtype in (torch.float8_e4m3fn, torch.float64)
    require(known, f"{name}: codes must be torch.float8_e4m3fn, not {codes.dtype}")
    require_floating(name, codes=codes, weight=weight)
    for what, vector in (("scale", scale), ("weight_scale", weight_scale), ("bias", bias)):
        floating = vector is None or vector.dtype.is_floating_point
        require(
            floating, f"{name}: {what} must be floating, not {vector.dtype if vector is not None else ''}"
        )
    require(dtype.is_floating_point, f"{name}: the result must be floating, not {dtype}")
    fits = codes.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == codes.shape[-1]
    require(fits, f"{name}: weight {shape_of(weight)} does not fit codes {shape_of(codes)}")
    require(codes.shape[-1] > 0, f"{name}: codes have no features")
    fits = tuple(scale.shape) == (*codes.shape[:-1], 1)
    require(fits, f"{name}: scale {shape_of(scale)} does not fit codes {shape_of(codes)}")
    for what, vector in (("weight_scale", weight_scale), ("bias", bias)):
        fits = vector is None or vector.shape == weight.shape[:1]
        require(fits, f"{name}: {what} {shape_of(vector)} does not fit weight {shape_of(weight)}")
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


def _reference(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight_NK: torch.Tensor,
    weight_scale_N: torch.Tensor,
    dtype: torch.dtype,
    bias_N: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    wide = torch.promote_types(scale.dtype, torch.float32)
    out = F.linear(codes.to(wide), weight_NK.to(wide)) * scale.to(wide) * weight_scale_N.to(wide)
    if bias_N is not None:
        out = out + bias_N.to(wide)
    return TORCH[activation](out, parameter).to(dtype).contiguous()


def _cost(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> Cost:
    """One matrix product; a byte a code is read."""
    return product_cost(codes, weight.shape, scale, weight, weight_scale, bias, dtype=dtype)


def _refuses(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> str | None:
    if dtype == torch.float64:
        return "the result is float64, and kernels accumulate in float32"
    return refuse_float8(codes, scale, weight, weight_scale, bias)


def _onnx(
    codes: Value,
    scale: Value,
    weight: Value,
    weight_scale: Value,
    dtype: int,
    bias: Value | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> Any:
    """The numbers that the codes stand for, multiplied in float32, as ONNX Runtime's CPU can."""
    kind = ir.DataType.FLOAT
    x, scale, weight, weight_scale, bias = (
        v if v is None or v.dtype == kind else op.Cast(v, to=int(kind))
        for v in (codes, scale, weight, weight_scale, bias)
    )
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    out = op.Mul(op.Mul(product, scale), weight_scale)
    out = out if bias is None else op.Add(out, bias)
    return finished(out, activation, parameter, dtype)


def _samples() -> Iterator[Sample]:
    x, weight = QUANTIZE_ROWS(torch.randn(2, 5, 32)), _weight(24, 32)
    bias, kind = torch.randn(24), torch.float32
    yield Sample((*x, *weight, kind, bias), label="bias")
    yield Sample((*x, *weight, kind), label="no bias")
    for activation in ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu"):
        yield Sample((*x, *weight, kind, bias, activation, 1.702), label=activation)
    yield Sample((*x, *weight, torch.float16, bias), label="half precision")
    odd = QUANTIZE_ROWS(torch.randn(7, 37))
    yield Sample((*odd, *_weight(19, 37), kind, torch.randn(19)), label="odd sizes")
    yield Sample((*(v[0, 0] for v in x), *weight, kind, bias), label="one token")
    large = QUANTIZE_ROWS(100 * torch.randn(2, 5, 32))
    yield Sample((*large, *weight, kind, bias, "silu"), label="large magnitudes")


def _weight(outputs: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = QUANTIZE_ROWS(torch.randn(outputs, features) / features**0.5)
    return codes, scale.squeeze(1)


def _bad_samples() -> Iterator[BadSample]:
    (codes, scale), (weight, rows) = QUANTIZE_ROWS(torch.randn(2, 32)), _weight(24, 32)
    kind = torch.float32
    yield BadSample((codes.float(), scale, weight, rows, kind), match="codes must be torch.float8_e4m3fn")
    yield BadSample((codes, scale, weight.float(), rows, kind), match="weight is torch.float32")
    yield BadSample((codes, scale, weight[:, :16], rows, kind), match="does not fit codes")
    yield BadSample((codes, scale[0], weight, rows, kind), match=r"scale \(1,\) does not fit")
    yield BadSample((codes, scale, weight, rows[:3], kind), match=r"weight_scale \(3,\) does not fit")
    yield BadSample((codes, scale, weight, rows, kind, scale[0]), match=r"bias \(1,\) does not fit")
    yield BadSample((codes, scale.int(), weight, rows, kind), match="scale must be floating")
    yield BadSample((codes, scale, weight, rows, torch.int8), match="result must be floating")
    yield BadSample((codes[:, :0], scale, weight[:, :0], rows, kind), match="codes have no features")
    yield BadSample((codes, scale, weight, rows, kind, None, "swish"), match="activation is one of")


TRITON = TritonFace(float8_product, _refuses)
OP = register(Op("float8_linear", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
