"""The RMSNorm of a block's output, its sum with the residual stream, and the RMSNorm of that sum.

    total = residual + x / sqrt(mean(x**2) + eps) * weight
    out = total / sqrt(mean(total**2) + next_eps) * next_weight

The means are over the last dimension, taken in float32 or better. One kernel reads a row of both summands and
writes two; a norm, and a norm of the sum behind it, read and write half as much again. The residual may be
one for all sequences, and one of the two may be float32 beside a half-precision other: the sum is float32
then.

Source: Gemma 2 (arXiv:2408.00118), section 2, after Ding et al., CogView (arXiv:2105.13290), section 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels import _onnx as lowering
from graphopt.kernels import add_rms_norm, rms_norm
from graphopt.kernels._onnx import Value
from graphopt.kernels._rows import (
    broadcast_tile,
    launch_with_residual,
    refuse_row,
    row_pointers,
    row_tile,
    scaled,
    vector,
)
from graphopt.kernels._shape import (
    nbytes,
    require_floating,
    require_last_dim,
    require_residual,
    require_weight,
    total_bytes,
)
from graphopt.kernels._triton import jit, refuse, tl, wait_for_all, wait_for_inputs

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? next_weight, float eps, float next_eps)"
    " -> (Tensor normed, Tensor total)"
)


def _shape(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    eps: float,
    next_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape rule.

    Args:
        x: (..., D), floating.
        residual: a shape that broadcasts to x's; x's dtype, or one of the two is float32, the other half.
        weight: (D,), of the norm of x; x's dtype or float32; None for ones.
        next_weight: (D,), of the norm of the sum; x's dtype or float32; None for ones.
        eps: added to the mean square of x.
        next_eps: added to the mean square of the sum.

    Returns:
        Empty ``out`` of x's dtype and ``total`` of the type that holds both summands, both of x's shape.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_floating("sandwich_rms_norm", x=x)
    require_weight("sandwich_rms_norm", x, weight)
    require_weight("sandwich_rms_norm", x, next_weight, "next_weight")
    require_last_dim("sandwich_rms_norm", x, weight=weight, next_weight=next_weight)
    require_residual("sandwich_rms_norm", x, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor | None,
    next_weight_D: torch.Tensor | None,
    eps: float,
    next_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = rms_norm.OP.reference(x, weight_D, eps)
    both: tuple[torch.Tensor, torch.Tensor] = add_rms_norm.OP.reference(
        normed, residual, next_weight_D, next_eps
    )
    return both


def _cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    eps: float,
    next_eps: float,
) -> Cost:
    """Nine operations an element: four a norm, and the sum."""
    moved = nbytes(x, residual, weight, next_weight, x) + total_bytes(x, residual)
    return Cost(flops=9.0 * x.numel(), bytes=moved)


@jit
def _sandwich_rms_norm_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    total_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    next_weight_ptr,
    rows,
    stride_xr,
    inner,
    stride_outer,
    stride_inner,
    eps,
    next_eps,
    D: tl.constexpr,
    PERIODIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row, column, seen = row_tile(rows, D, BLOCK_R, BLOCK_D)
    weight = vector(weight_ptr, column, D, 1.0)
    next_weight = vector(next_weight_ptr, column, D, 1.0)
    wait_for_inputs(PDL)
    x = tl.load(row_pointers(x_ptr, row, column, stride_xr), mask=seen, other=0.0).to(tl.float32)
    residual = broadcast_tile(residual_ptr, row, column, seen, inner, stride_outer, stride_inner, PERIODIC)
    total = (residual + scaled(x, seen, D, eps) * weight).to(total_ptr.dtype.element_ty)
    tl.store(row_pointers(total_ptr, row, column, D), total, mask=seen)
    normed = scaled(total.to(tl.float32), seen, D, next_eps) * next_weight
    tl.store(row_pointers(out_ptr, row, column, D), normed, mask=seen)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    eps: float,
    next_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = x.new_empty(x.shape)
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    vectors = weight, next_weight
    launch_with_residual(_sandwich_rms_norm_kernel, (out, total), x, residual, vectors, eps, next_eps)
    return out, total


def _refuses(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    eps: float,
    next_eps: float,
) -> str | None:
    return refuse(x, residual, weight, next_weight) or refuse_row(x.shape[-1])


def _onnx(
    x: Value, residual: Value, weight: Value | None, next_weight: Value | None, eps: float, next_eps: float
) -> tuple[Any, Any]:
    normed = lowering.typed(lowering.rms_norm(x, x, weight, eps), x)
    return lowering.add_norm(
        "SkipSimplifiedLayerNormalization", normed, residual, next_weight, None, next_eps
    )


def _samples() -> Iterator[Sample]:
    weight, after = torch.randn(24), torch.randn(24)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    yield Sample((x, residual, weight, after, 1e-6, 1e-5), label="both weights")
    yield Sample((x, residual, None, after, 1e-6, 1e-6), label="no first weight")
    yield Sample((x, residual, weight, None, 1e-6, 1e-6), label="no second weight")
    yield Sample((x[0], residual[0], weight, after, 1e-6, 1e-6), label="two dimensions")
    yield Sample((x[:, :, None], residual[:, :, None], weight, after, 1e-6, 1e-6), label="four dimensions")
    odd = torch.randn(3, 7, 5), torch.randn(3, 7, 5), torch.randn(5), torch.randn(5)
    yield Sample((*odd, 1e-6, 1e-6), label="odd sizes")
    yield Sample((1e3 * x, residual, weight, after, 1e-6, 1e-6), label="large magnitudes")
    yield Sample((x, 1e3 * residual, weight, after, 1e-6, 1e-6), label="a large residual")
    yield Sample((x, residual[:1], weight, after, 1e-6, 1e-6), label="a residual for all sequences")
    yield Sample((x, residual[0], None, None, 1e-6, 1e-6), label="a residual of fewer dimensions")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    yield BadSample((x, x[:, :2], weight, weight, 1e-6, 1e-6), match="does not broadcast to x")
    yield BadSample((x[:1], x, weight, weight, 1e-6, 1e-6), match="does not broadcast to x")
    yield BadSample((x, x, weight[:8], weight, 1e-6, 1e-6), match=r"weight has shape \(8,\)")
    yield BadSample((x, x, None, weight[:8], 1e-6, 1e-6), match=r"next_weight has shape \(8,\)")
    yield BadSample((x, x, weight, weight.double(), 1e-6, 1e-6), match="next_weight is torch.float64")
    yield BadSample((x, x.double(), weight, weight, 1e-6, 1e-6), match="residual is torch.float64")


TRITON = TritonFace(_launch, _refuses)
OP = register(
    Op("sandwich_rms_norm", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON)
)
