"""The residual sum of a transformer block and the RMSNorm of it.

    total = x + residual
    out = total / sqrt(mean(total**2) + eps) * weight

The mean is over the last dimension, taken in float32 or better.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467), equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels._onnx import Value, add_norm
from graphopt.kernels._shape import (
    nbytes,
    require,
    require_floating,
    require_last_dim,
    require_weight,
    shape_of,
)

SCHEMA = "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor normed, Tensor total)"


def _shape(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape rule.

    Args:
        x: (..., D), floating.
        residual: x's shape and dtype.
        weight: (D,), x's dtype or float32; None for ones.
        eps: added to the mean square.

    Returns:
        Empty ``out`` and ``total``, both of x's shape and dtype.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    fits = x.shape == residual.shape
    require(fits, f"add_rms_norm: residual {shape_of(residual)} differs from x {shape_of(x)}")
    require_floating("add_rms_norm", x=x, residual=residual)
    require_weight("add_rms_norm", x, weight)
    require_last_dim("add_rms_norm", x, weight=weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _reference(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).contiguous()
    wide = total if weight_D is None else total.to(torch.promote_types(x.dtype, weight_D.dtype))
    weight_D = None if weight_D is None else weight_D.to(wide.dtype)
    return F.rms_norm(wide, x.shape[-1:], weight_D, eps).to(x.dtype), total


def _cost(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Cost:
    """Five operations an element: the sum, two for the mean square, two to scale."""
    return Cost(flops=5.0 * x.numel(), bytes=nbytes(x, residual, weight, x, x))


def _onnx(x: Value, residual: Value, weight: Value | None, eps: float) -> tuple[Any, Any]:
    return add_norm("SkipSimplifiedLayerNormalization", x, residual, weight, None, eps)


def _samples() -> Iterator[Sample]:
    weight = torch.randn(24)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    yield Sample((x, residual, weight, 1e-6), label="weight")
    yield Sample((x, residual, None, 1e-5), label="no weight")
    yield Sample((x[0], residual[0], weight, 1e-6), label="two dimensions")
    yield Sample((x[:, :, None], residual[:, :, None], weight, 1e-6), label="four dimensions")
    yield Sample((torch.randn(3, 7, 5), torch.randn(3, 7, 5), torch.randn(5), 1e-6), label="odd sizes")
    yield Sample((1e3 * x, residual, weight, 1e-6), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    yield BadSample((x, x[:1], weight, 1e-6), match="differs from x")
    yield BadSample((x, x, weight[:8], 1e-6), match=r"weight has shape \(8,\)")
    yield BadSample((x, x.double(), weight, 1e-6), match="residual is torch.float64")


OP = register(Op("add_rms_norm", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
