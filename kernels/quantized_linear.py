"""A projection whose weight stays in 8 bits: a scale for each output, or one for all.

    out = x @ ((weight - zero_point) * scale).T + bias

The weight is read as bytes, and widened on its way to the product. Where widening all of it for a library's
product is the faster way, as for many rows, the executor that measures takes that one.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference (arXiv:1712.05877), of the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._linear_triton import refuse_product
from graphopt.kernels._onnx import Value, dequantized, linear
from graphopt.kernels._quantized_triton import quantized_product
from graphopt.kernels._shape import product_cost, require, require_floating, shape_of

SCHEMA = "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? zero_point=None) -> Tensor"


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (..., K), floating.
        weight: (N, K), int8 or uint8.
        scale: (N,), x's dtype.
        bias: (N,), x's dtype; None for zeros.
        zero_point: (N,), weight's dtype: what stands for 0; None for zeros.

    Returns:
        An empty (..., N) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_floating("quantized_linear", x=x, scale=scale, bias=bias)
    known = weight.dtype in (torch.int8, torch.uint8)
    require(known, f"quantized_linear: weight must be torch.int8 or torch.uint8, not {weight.dtype}")
    fits = zero_point is None or zero_point.dtype == weight.dtype
    require(fits, f"quantized_linear: zero_point must be {weight.dtype}, as the weight")
    fits = x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    require(fits, f"quantized_linear: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    for name, vector in (("scale", scale), ("bias", bias), ("zero_point", zero_point)):
        fits = vector is None or vector.shape == weight.shape[:1]
        require(fits, f"quantized_linear: {name} {shape_of(vector)} does not fit weight {shape_of(weight)}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    zero_point_N: torch.Tensor | None = None,
) -> torch.Tensor:
    centred_NK = weight_NK.to(x.dtype)
    if zero_point_N is not None:
        centred_NK = centred_NK - zero_point_N[:, None].to(x.dtype)
    return F.linear(x, centred_NK * scale_N[:, None], bias_N).contiguous()


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> Cost:
    """One matrix product; a byte a weight is read."""
    return product_cost(x, weight.shape, weight, scale, bias, zero_point)


def _refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> str | None:
    return refuse_product(x, weight, scale, bias, zero_point)


def _onnx(
    x: Value, weight: Value, scale: Value, bias: Value | None = None, zero_point: Value | None = None
) -> Any:
    """DequantizeLinear and Gemm; the file keeps a byte a weight."""
    return linear(x, dequantized(weight, scale, zero_point), bias)


def _samples() -> Iterator[Sample]:
    weight = torch.randint(-127, 128, (20, 12), dtype=torch.int8)
    x, scale, bias = torch.randn(2, 5, 12), (torch.rand(20) + 0.5) / 127, torch.randn(20)
    yield Sample((x, weight, scale, bias), label="bias")
    yield Sample((x, weight, scale), label="no bias")
    yield Sample((x[:, 0], weight, scale, bias), label="two dimensions")
    yield Sample((1e2 * x, weight, scale, bias), label="large magnitudes")
    zero_point = torch.randint(-20, 20, (20,), dtype=torch.int8)
    yield Sample((x, weight, scale, bias, zero_point), label="zero points")
    unsigned = (weight.int() + 128).to(torch.uint8), scale, None, (zero_point.int() + 128).to(torch.uint8)
    yield Sample((x, *unsigned), label="unsigned, zero points, no bias")


def _bad_samples() -> Iterator[BadSample]:
    x, weight, scale = torch.randn(2, 12), torch.ones(20, 12, dtype=torch.int8), torch.ones(20)
    yield BadSample((x, weight.float(), scale), match="weight must be torch.int8 or torch.uint8")
    yield BadSample((x, weight.T.contiguous(), scale), match="does not fit x")
    yield BadSample((x, weight, scale[:3]), match=r"scale \(3,\) does not fit")
    yield BadSample((x, weight, scale, scale[:3]), match=r"bias \(3,\) does not fit")
    zero_point = torch.ones(20, dtype=torch.uint8)
    yield BadSample((x, weight, scale, None, zero_point), match="zero_point must be torch.int8")
    zero_point = torch.ones(3, dtype=torch.int8)
    yield BadSample((x, weight, scale, None, zero_point), match=r"zero_point \(3,\) does not fit")


TRITON = TritonFace(quantized_product, _refuses)
OP = register(
    Op("quantized_linear", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON)
)
