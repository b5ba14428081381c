"""A projection, the residual sum after it and the LayerNorm of that: how a block of a transformer ends.

    total = x @ weight.T + bias + residual
    out = (total - mean(total)) / sqrt(var(total) + eps) * norm_weight + norm_bias

Mean and (biased) variance are over the last dimension. In one op because a product of few rows has too few
tiles to fill a GPU: it is cut along its depth, and the norm, which must read every sum anyway, adds up the
parts.

Source: Ba et al., Layer Normalization (arXiv:1607.06450), equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._linear_triton import chosen, products, refuse_product, sum_splits
from graphopt.kernels._onnx import Value, add_norm, linear
from graphopt.kernels._rows import centred_and_scaled, refuse_row, row_configs, row_tile, vector
from graphopt.kernels._shape import nbytes, require, require_floating, require_last_dim, shape_of
from graphopt.kernels._triton import as_rows, jit, launch, tl, wait_for_all, wait_for_inputs
from graphopt.kernels._tuning import choose

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? norm_weight, Tensor? norm_bias,"
    " float eps) -> (Tensor normed, Tensor total)"
)


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape rule.

    Args:
        x: (..., K), floating.
        weight: (D, K), x's dtype.
        bias: (D,), x's dtype; None for zeros.
        residual: (..., D), x's dtype.
        norm_weight: (D,), x's dtype; None for ones.
        norm_bias: (D,), x's dtype; None for zeros.
        eps: added to the variance.

    Returns:
        Empty ``out`` and ``total``, both (..., D) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    name, vectors = (
        "linear_add_layer_norm",
        {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias},
    )
    require_floating(name, x=x, weight=weight, residual=residual, **vectors)
    fits = x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    require(fits, f"{name}: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    shape = (*x.shape[:-1], weight.shape[0])
    require(
        tuple(residual.shape) == shape, f"{name}: residual {shape_of(residual)} is not the product's {shape}"
    )
    require_last_dim(name, residual, **vectors)
    return x.new_empty(shape), x.new_empty(shape)


def _reference(
    x: torch.Tensor,
    weight_DK: torch.Tensor,
    bias_D: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight_D: torch.Tensor | None,
    norm_bias_D: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (F.linear(x, weight_DK, bias_D) + residual).contiguous()
    return F.layer_norm(total, total.shape[-1:], norm_weight_D, norm_bias_D, eps), total


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
) -> Cost:
    """The product, and nine operations an element for the sum and the norm."""
    moved = nbytes(x, weight, bias, residual, norm_weight, norm_bias, residual, residual)
    return Cost(flops=(2.0 * x.shape[-1] + 9) * residual.numel(), bytes=moved)


@jit
def _split_norm_kernel(  # type: ignore[no-untyped-def]
    normed_ptr,
    total_ptr,
    partial_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    rows,
    stride_rr,
    eps,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row, column, seen = row_tile(rows, D, BLOCK_R, BLOCK_D)
    bias = vector(bias_ptr, column, D, 0.0)
    norm_weight = vector(norm_weight_ptr, column, D, 1.0)
    norm_bias = vector(norm_bias_ptr, column, D, 0.0)
    wait_for_inputs(PDL)
    residual = tl.load(residual_ptr + row * stride_rr + column, mask=seen, other=0.0).to(tl.float32)
    size = tl.cast(rows, tl.int64) * D  # one row is a constant, which has no method for it
    total = sum_splits(partial_ptr, row * D + column, seen, size, SPLITS) + bias + residual
    tl.store(total_ptr + row * D + column, total, mask=seen)
    normed = centred_and_scaled(total, seen, D, eps) * norm_weight + norm_bias
    tl.store(normed_ptr + row * D + column, normed, mask=seen)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_MK, residual_MD = as_rows(x), as_rows(residual)
    M, D = residual_MD.shape
    parts = chosen(x_MK, weight, finished=True, then_summed=True)
    partial = products(x_MK, weight, parts)
    normed, total = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    splits = parts.tiles.get("SPLITS", 1)
    key = M, D, x.dtype, splits
    config = choose(_split_norm_kernel, x.device, key, row_configs(M, D, x.device))
    vectors = [None if v is None else v.contiguous() for v in (bias, norm_weight, norm_bias)]
    args = normed, total, partial, vectors[0], residual_MD, *vectors[1:], M, residual_MD.stride(0), eps
    grid = (-(-M // config.tiles["BLOCK_R"]),)
    launch(_split_norm_kernel, grid, *args, early=vectors, D=D, SPLITS=splits, **config.options)
    return normed, total


def _refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
) -> str | None:
    given = x, weight, bias, residual, norm_weight, norm_bias
    return refuse_product(*given) or refuse_row(weight.shape[0])


def _onnx(
    x: Value,
    weight: Value,
    bias: Value | None,
    residual: Value,
    norm_weight: Value | None,
    norm_bias: Value | None,
    eps: float,
) -> tuple[Any, Any]:
    """The two apart: ONNX Runtime has no node for both."""
    product = linear(x, weight, bias)
    product.type, product.shape = residual.type, residual.shape
    return add_norm("SkipLayerNormalization", product, residual, norm_weight, norm_bias, eps)


def _samples() -> Iterator[Sample]:
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(20, 12) / 12**0.5, torch.randn(20)
    residual, norm_weight, norm_bias = torch.randn(2, 5, 20), torch.randn(20), torch.randn(20)
    yield Sample((x, weight, bias, residual, norm_weight, norm_bias, 1e-5), label="all vectors")
    yield Sample((x, weight, None, residual, norm_weight, None, 1e-12), label="a weight alone")
    yield Sample((x, weight, bias, residual, None, None, 1e-5), label="a norm of nothing")
    yield Sample((x[0], weight, bias, residual[0], norm_weight, norm_bias, 1e-5), label="two dimensions")
    odd = torch.randn(3, 7, 33), torch.randn(37, 33) / 33**0.5, None, torch.randn(3, 7, 37)
    yield Sample((*odd, None, torch.randn(37), 1e-5), label="odd sizes")
    yield Sample((100 * x, weight, bias, residual, norm_weight, norm_bias, 1e-5), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, weight, residual = torch.randn(2, 5, 12), torch.randn(20, 12), torch.randn(2, 5, 20)
    yield BadSample((x, weight.T, None, residual, None, None, 1e-5), match="does not fit x")
    yield BadSample((x, weight, None, x, None, None, 1e-5), match=r"is not the product's \(2, 5, 20\)")
    yield BadSample((x, weight, None, residual.double(), None, None, 1e-5), match="residual is torch.float64")
    yield BadSample((x, weight, weight[0], residual, None, None, 1e-5), match=r"bias has shape \(12,\)")
    yield BadSample((x, weight, None, residual, weight[0], None, 1e-5), match="norm_weight has shape")


OP = register(
    Op(
        "linear_add_layer_norm",
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
