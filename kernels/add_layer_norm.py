"""The residual sum of a transformer block and the LayerNorm of it.

    total = x + residual
    out = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

Mean and (biased) variance are over the last dimension.

Source: Ba et al., Layer Normalization (arXiv:1607.06450), equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels._onnx import Value, add_norm
from graphopt.kernels._shape import nbytes, require, require_floating, require_last_dim, shape_of

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor normed, Tensor total)"
)


def _shape(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape rule.

    Args:
        x: (..., D), floating.
        residual: x's shape and dtype.
        weight: (D,), x's dtype; None for ones.
        bias: (D,), x's dtype; None for zeros.
        eps: added to the variance.

    Returns:
        Empty ``out`` and ``total``, both of x's shape.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    fits = x.shape == residual.shape
    require(fits, f"add_layer_norm: residual {shape_of(residual)} differs from x {shape_of(x)}")
    require_floating("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    require_last_dim("add_layer_norm", x, weight=weight, bias=bias)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor | None,
    bias_D: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).contiguous()
    return F.layer_norm(total, x.shape[-1:], weight_D, bias_D, eps), total


def _cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Cost:
    """Nine operations an element: the sum, two a statistic, four to normalise, scale and shift."""
    return Cost(flops=9.0 * x.numel(), bytes=nbytes(x, residual, weight, bias, x, x))


def _onnx(x: Value, residual: Value, weight: Value | None, bias: Value | None, eps: float) -> tuple[Any, Any]:
    return add_norm("SkipLayerNormalization", x, residual, weight, bias, eps)


def _samples() -> Iterator[Sample]:
    weight, bias = torch.randn(24), torch.randn(24)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    yield Sample((x, residual, weight, bias, 1e-5), label="weight and bias")
    yield Sample((x, residual, weight, None, 1e-12), label="weight")
    yield Sample((x, residual, None, None, 1e-5), label="neither")
    yield Sample((x[0], residual[0], weight, bias, 1e-5), label="two dimensions")
    yield Sample((x[:, :, None], residual[:, :, None], weight, bias, 1e-5), label="four dimensions")
    yield Sample((torch.randn(3, 7, 5), torch.randn(3, 7, 5), None, torch.randn(5), 1e-5), label="odd sizes")
    yield Sample((1e4 * x, residual, weight, bias, 1e-5), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    yield BadSample((x, x[:1], weight, None, 1e-5), match="differs from x")
    yield BadSample((x, x, weight[:8], None, 1e-5), match=r"weight has shape \(8,\)")
    yield BadSample((x, x, weight, weight.double(), 1e-5), match="bias is torch.float64")


OP = register(Op("add_layer_norm", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
