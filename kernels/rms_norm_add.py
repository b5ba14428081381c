"""The RMSNorm of a block's output, added to the residual stream.

    out = residual + x / sqrt(mean(x**2) + eps) * weight

The mean is over the last dimension, taken in float32 or better. The residual may be one for all sequences,
and one of the two may be float32 beside a half-precision other: the sum is float32 then.

Source: OLMo 2 (arXiv:2501.00656), section 3.1, which norms what a block puts out, not what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels import _onnx as lowering
from graphopt.kernels import rms_norm
from graphopt.kernels._onnx import Value, op
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

SCHEMA = "(Tensor x, Tensor residual, Tensor? weight, float eps) -> Tensor"


def _shape(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (..., D), floating.
        residual: a shape that broadcasts to x's; x's dtype, or one of the two is float32, the other half.
        weight: (D,), x's dtype or float32; None for ones.
        eps: added to the mean square.

    Returns:
        An empty tensor of x's shape and of the type that holds both summands.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_floating("rms_norm_add", x=x)
    require_weight("rms_norm_add", x, weight)
    require_last_dim("rms_norm_add", x, weight=weight)
    require_residual("rms_norm_add", x, residual)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _reference(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor | None, eps: float
) -> torch.Tensor:
    total: torch.Tensor = residual + rms_norm.OP.reference(x, weight_D, eps)
    return total.contiguous()


def _cost(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Cost:
    """Five operations an element: two for the mean square, two to scale, the sum."""
    return Cost(flops=5.0 * x.numel(), bytes=nbytes(x, residual, weight) + total_bytes(x, residual))


@jit
def _rms_norm_add_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    rows,
    stride_xr,
    inner,
    stride_outer,
    stride_inner,
    eps,
    D: tl.constexpr,
    PERIODIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row, column, seen = row_tile(rows, D, BLOCK_R, BLOCK_D)
    weight = vector(weight_ptr, column, D, 1.0)
    wait_for_inputs(PDL)
    x = tl.load(row_pointers(x_ptr, row, column, stride_xr), mask=seen, other=0.0).to(tl.float32)
    residual = broadcast_tile(residual_ptr, row, column, seen, inner, stride_outer, stride_inner, PERIODIC)
    total = residual + scaled(x, seen, D, eps) * weight
    tl.store(row_pointers(out_ptr, row, column, D), total, mask=seen)


def _launch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    launch_with_residual(_rms_norm_add_kernel, (out,), x, residual, (weight,), eps)
    return out


def _refuses(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> str | None:
    return refuse(x, residual, weight) or refuse_row(x.shape[-1])


def _onnx(x: Value, residual: Value, weight: Value | None, eps: float) -> Any:
    return lowering.added(lowering.rms_norm(x, x, weight, eps), x, residual, op.Add)


def _samples() -> Iterator[Sample]:
    weight = torch.randn(24)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    yield Sample((x, residual, weight, 1e-6), label="weight")
    yield Sample((x, residual, None, 1e-5), label="no weight")
    yield Sample((x[0], residual[0], weight, 1e-6), label="two dimensions")
    yield Sample((x[:, :, None], residual[:, :, None], weight, 1e-6), label="four dimensions")
    yield Sample((torch.randn(3, 7, 5), torch.randn(3, 7, 5), torch.randn(5), 1e-6), label="odd sizes")
    yield Sample((1e3 * x, residual, weight, 1e-6), label="large magnitudes")
    yield Sample((x, 1e3 * residual, weight, 1e-6), label="a large residual")
    yield Sample((x, residual[:1], weight, 1e-6), label="a residual for all sequences")
    yield Sample((x, residual[0], None, 1e-6), label="a residual of fewer dimensions")
    yield Sample((x, residual[:, :1], weight, 1e-6), label="a residual for all positions")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    yield BadSample((x, x[:, :2], weight, 1e-6), match="does not broadcast to x")
    yield BadSample((x[:1], x, weight, 1e-6), match="does not broadcast to x")
    yield BadSample((x, x, weight[:8], 1e-6), match=r"weight has shape \(8,\)")
    yield BadSample((x, x, weight.double(), 1e-6), match="weight is torch.float64")
    yield BadSample((x, x.double(), weight, 1e-6), match="residual is torch.float64")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("rms_norm_add", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
