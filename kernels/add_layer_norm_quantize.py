"""The residual sum of a transformer block, the LayerNorm of it, and the rows of that in float8.

    total = x + residual
    out = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias
    codes, scale = quantize_rows(out)

Norm and codes are of the sum before it is rounded to ``total``. In one op because a norm's kernel has whole
rows in its registers, and a row's largest number is all that quantizing it waits for.

Source: Ba et al., Layer Normalization (arXiv:1607.06450), equation 4; ``quantize_rows``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels import add_layer_norm, quantize_rows
from graphopt.kernels._float8_triton import quantized, refuse_float8
from graphopt.kernels._onnx import Value, add_norm, op, typed
from graphopt.kernels._rows import (
    broadcast_tile,
    centred_and_scaled,
    launch_with_residual,
    refuse_row,
    row_pointers,
    row_tile,
    vector,
)
from graphopt.kernels._triton import jit, tl, wait_for_all, wait_for_inputs
from graphopt.kernels.quantize_rows import LARGEST_CODE, LEAST_ROW

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor normed, Tensor total, Tensor codes, Tensor scale)"
)
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _shape(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Results:
    """The shape rule.

    Args:
        x: (..., D), floating.
        residual: a shape that broadcasts to x's; x's dtype, or one of the two is float32, the other half.
        weight: (D,), x's dtype; None for ones.
        bias: (D,), x's dtype; None for zeros.
        eps: added to the variance.

    Returns:
        Empty ``normed`` and ``total`` as of ``add_layer_norm``, ``codes``, (..., D) in float8_e4m3fn, and
        ``scale``, (..., 1) in float32.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    try:
        normed, total = add_layer_norm.OP.shape(x, residual, weight, bias, eps)
    except ValueError as error:
        raise ValueError(f"add_layer_norm_quantize: {str(error).partition(': ')[2]}") from None
    return normed, total, *quantize_rows.OP.shape(normed)


def _reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor | None,
    bias_D: torch.Tensor | None,
    eps: float,
) -> Results:
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    total = (x.to(wide) + residual.to(wide)).contiguous()
    weight_D, bias_D = (None if v is None else v.to(wide) for v in (weight_D, bias_D))
    normed = F.layer_norm(total, x.shape[-1:], weight_D, bias_D, eps)
    kept = total.to(torch.promote_types(x.dtype, residual.dtype))
    return normed.to(x.dtype), kept, *quantize_rows.OP.reference(normed)


def _cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Cost:
    """The norm, and a magnitude, a comparison and a product an element for its codes."""
    norm, rows = add_layer_norm.OP.cost(x, residual, weight, bias, eps), quantize_rows.OP.cost(x)
    written = x.numel() + 4 * (x.numel() // x.shape[-1])
    return Cost(norm.flops + rows.flops, norm.bytes + written)


@jit
def _add_layer_norm_quantize_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    total_ptr,
    codes_ptr,
    scale_ptr,
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
    total = x + residual
    tl.store(row_pointers(total_ptr, row, column, D), total, mask=seen)
    normed = tl.where(seen, centred_and_scaled(total, seen, D, eps) * weight + bias, 0.0)
    tl.store(row_pointers(out_ptr, row, column, D), normed, mask=seen)
    codes, scale = quantized(normed, LARGEST_CODE, LEAST_ROW)
    tl.store(row_pointers(codes_ptr, row, column, D), codes, mask=seen)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Results:
    results: Results = _shape(x, residual, weight, bias, eps)
    launch_with_residual(_add_layer_norm_quantize_kernel, results, x, residual, (weight, bias), eps)
    return results


def _refuses(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> str | None:
    return refuse_float8(x, residual, weight, bias) or refuse_row(x.shape[-1])


def _onnx(x: Value, residual: Value, weight: Value | None, bias: Value | None, eps: float) -> Any:
    """The two one after the other, in float32: codes are of the norm before it is rounded."""
    given, kind = (x.dtype, residual.dtype), ir.DataType.FLOAT
    x, residual, weight, bias = (None if v is None else _wide(v) for v in (x, residual, weight, bias))
    normed, total = add_norm("SkipLayerNormalization", x, residual, weight, bias, eps)
    normed.dtype = kind
    codes, scale = quantize_rows.OP.onnx(normed)
    if given[0] != kind:
        normed = op.Cast(normed, to=int(given[0]))
    if kind not in given:
        total = op.Cast(total, to=int(given[0]))
    return normed, total, codes, scale


def _wide(x: Value) -> Any:
    if x.dtype == ir.DataType.FLOAT:
        return x
    found = typed(op.Cast(x, to=int(ir.DataType.FLOAT)), x)
    found.dtype = ir.DataType.FLOAT
    return found


def _samples() -> Iterator[Sample]:
    weight, bias = torch.randn(24), torch.randn(24)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    yield Sample((x, residual, weight, bias, 1e-5), label="weight and bias")
    yield Sample((x, residual, None, None, 1e-5), label="neither")
    yield Sample((x[0], residual[0], weight, None, 1e-12), label="two dimensions")
    yield Sample((torch.randn(3, 7, 5), torch.randn(3, 7, 5), None, torch.randn(5), 1e-5), label="odd sizes")
    yield Sample((1e4 * x, residual, weight, bias, 1e-5), label="large magnitudes")
    yield Sample((x, residual[:1], weight, bias, 1e-5), label="a residual for all sequences")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    yield BadSample((x, x[:, :2], weight, None, 1e-5), match="does not broadcast to x")
    yield BadSample((x, x.double(), weight, None, 1e-5), match="residual is torch.float64")
    yield BadSample((x, x, weight[:8], None, 1e-5), match=r"weight has shape \(8,\)")


OP = register(
    Op(
        "add_layer_norm_quantize",
        SCHEMA,
        _shape,
        _reference,
        _cost,
        _onnx,
        _samples,
        _bad_samples,
        TritonFace(_launch, _refuses),
    )
)
