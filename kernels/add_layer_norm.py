"""The residual sum of a transformer block and the LayerNorm of it.

    total = x + residual
    out = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

Mean and (biased) variance are over the last dimension. The residual may be one for all sequences, as position
embeddings are, and one of the two may be float32 beside a half-precision other: the sum is float32 then.

Source: Ba et al., Layer Normalization (arXiv:1607.06450), equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._onnx import Value, add_norm
from graphopt.kernels._rows import (
    broadcast_tile,
    centred_and_scaled,
    launch_with_residual,
    refuse_row,
    row_pointers,
    row_tile,
    vector,
)
from graphopt.kernels._shape import nbytes, require_floating, require_last_dim, require_residual, total_bytes
from graphopt.kernels._triton import jit, refuse, tl, wait_for_all, wait_for_inputs

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
        residual: a shape that broadcasts to x's; x's dtype, or one of the two is float32, the other half.
        weight: (D,), x's dtype; None for ones.
        bias: (D,), x's dtype; None for zeros.
        eps: added to the variance.

    Returns:
        Empty ``out`` of x's dtype and ``total`` of the type that holds both summands, both of x's shape.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_floating("add_layer_norm", x=x, weight=weight, bias=bias)
    require_last_dim("add_layer_norm", x, weight=weight, bias=bias)
    require_residual("add_layer_norm", x, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor | None,
    bias_D: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).contiguous()
    weight_D, bias_D = (None if v is None else v.to(total.dtype) for v in (weight_D, bias_D))
    return F.layer_norm(total, x.shape[-1:], weight_D, bias_D, eps).to(x.dtype), total


def _cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Cost:
    """Nine operations an element: the sum, two a statistic, four to normalise, scale and shift."""
    return Cost(flops=9.0 * x.numel(), bytes=nbytes(x, residual, weight, bias, x) + total_bytes(x, residual))


@jit
def _add_layer_norm_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    total_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
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
    bias = vector(bias_ptr, column, D, 0.0)
    wait_for_inputs(PDL)
    x = tl.load(row_pointers(x_ptr, row, column, stride_xr), mask=seen, other=0.0).to(tl.float32)
    residual = broadcast_tile(residual_ptr, row, column, seen, inner, stride_outer, stride_inner, PERIODIC)
    total = (x + residual).to(total_ptr.dtype.element_ty)
    tl.store(row_pointers(total_ptr, row, column, D), total, mask=seen)
    normed = centred_and_scaled(total.to(tl.float32), seen, D, eps)
    tl.store(row_pointers(out_ptr, row, column, D), normed * weight + bias, mask=seen)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = x.new_empty(x.shape)
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    launch_with_residual(_add_layer_norm_kernel, (out, total), x, residual, (weight, bias), eps)
    return out, total


def _refuses(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> str | None:
    return refuse(x, residual, weight, bias) or refuse_row(x.shape[-1])


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
    yield Sample((x, residual[:1], weight, bias, 1e-5), label="a residual for all sequences")
    yield Sample((x, residual[0], weight, None, 1e-5), label="a residual of fewer dimensions")
    yield Sample((x, residual[:, :1], None, None, 1e-5), label="a residual for all positions")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    yield BadSample((x, x[:, :2], weight, None, 1e-5), match="does not broadcast to x")
    yield BadSample((x[:1], x, weight, None, 1e-5), match="does not broadcast to x")
    yield BadSample((x, x.double(), weight, None, 1e-5), match="residual is torch.float64")
    yield BadSample((x, x, weight[:8], None, 1e-5), match=r"weight has shape \(8,\)")
    yield BadSample((x, x, weight, weight.double(), 1e-5), match="bias is torch.float64")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("add_layer_norm", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
