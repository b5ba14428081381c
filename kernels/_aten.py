"""Triton launchers for calls that stay ATen's: what a graph has beside graphopt's own ops.

``FACES`` maps an overload to its launcher and refusals, which take the overload's own arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.ir.op import TritonFace, op_of
from graphopt.kernels import conv_activation, linear_activation, pointwise, rms_norm
from graphopt.kernels._cat_triton import cat, refuse_cat
from graphopt.kernels._pool_triton import max_pool, mean_pool, refuse_max_pool, refuse_mean_pool
from graphopt.kernels._rows import (
    centred_and_scaled,
    power_of_two,
    refuse_row,
    row_configs,
    row_pointers,
    row_tile,
    trues_before,
    vector,
)
from graphopt.kernels._triton import (
    as_rows,
    jit,
    launch,
    processors,
    refuse,
    tl,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

aten = torch.ops.aten


# aten.layer_norm: (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions


@jit
def _layer_norm_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    stride_xr,
    eps,
    D: tl.constexpr,
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
    normed = centred_and_scaled(x, seen, D, eps)
    tl.store(row_pointers(out_ptr, row, column, D), normed * weight + bias, mask=seen)


def _layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    out = x.new_empty(x.shape)
    x_RD = as_rows(x if len(normalized_shape) == 1 else x.flatten(-len(normalized_shape)))
    rows, features = x_RD.shape
    vectors = tuple(None if v is None else v.contiguous() for v in (weight, bias))
    key = (rows, features, x.dtype, *(None if v is None else v.dtype for v in vectors))
    config = choose(_layer_norm_kernel, x.device, key, row_configs(rows, features, x.device))
    grid = (-(-rows // config.tiles["BLOCK_R"]),)
    args = (out, x_RD, *vectors, rows, x_RD.stride(0), eps)
    launch(_layer_norm_kernel, grid, *args, early=vectors, D=features, **config.options)
    return out


def _layer_norm_refuses(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> str | None:
    return refuse(x, weight, bias) or refuse_row(math.prod(normalized_shape))


# aten.rms_norm: graphopt's own, but that eps has a default


def _rms_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> Any:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return rms_norm.TRITON.launch(x, weight, eps)


def _rms_norm_refuses(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> str | None:
    if len(normalized_shape) != 1:
        return f"the norm is over {len(normalized_shape)} dimensions"
    if weight is not None and weight.dtype != x.dtype:
        return f"weight is {weight.dtype}, but x is {x.dtype}"
    return rms_norm.TRITON.refuses(x, weight, 0.0)


# aten.softmax: exp(x - max(x)) / sum(exp(x - max(x))) over the last dimension


@jit
def _softmax_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    rows,
    stride_xr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row, column, seen = row_tile(rows, D, BLOCK_R, BLOCK_D)
    wait_for_inputs(PDL)
    x = tl.load(row_pointers(x_ptr, row, column, stride_xr), mask=seen, other=-float("inf")).to(tl.float32)
    power = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    out = power / tl.sum(power, axis=1, keep_dims=True)
    tl.store(row_pointers(out_ptr, row, column, D), out, mask=seen)


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    out = x.new_empty(x.shape, dtype=dtype)
    x_RD = as_rows(x)
    rows, features = x_RD.shape
    key = (rows, features, x.dtype, out.dtype)
    config = choose(_softmax_kernel, x.device, key, row_configs(rows, features, x.device))
    grid = (-(-rows // config.tiles["BLOCK_R"]),)
    args = (out, x_RD, rows, x_RD.stride(0))
    launch(_softmax_kernel, grid, *args, D=features, **config.options)
    return out


def _softmax_refuses(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> str | None:
    if x.dim() == 0 or dim not in (-1, x.dim() - 1):
        return "the softmax is not over the last dimension"
    if not x.is_floating_point() or dtype == torch.float64:
        return f"the softmax is of {x.dtype} in {dtype}"
    return refuse(x) or refuse_row(x.shape[-1])


# aten.nonzero_static: the positions of what is not zero, in order, and a filling behind them


@jit
def _nonzero_static_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    numel,
    size,
    fill,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program finds the places of its own block; the last one also fills what is left."""
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    first = tl.program_id(0) * BLOCK
    before = trues_before(x_ptr, first, COUNTED)
    at = first + tl.arange(0, BLOCK)
    true = (tl.load(x_ptr + at, mask=at < numel, other=0) != 0).to(tl.int32)
    place = before + tl.cumsum(true, 0) - 1
    tl.store(out_ptr + place, at.to(tl.int64), mask=(true != 0) & (place < size))
    found = before + tl.sum(true)
    left = tl.where(tl.program_id(0) == tl.num_programs(0) - 1, size, 0)
    for start in range(found, left, BLOCK):
        spare = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + spare, tl.zeros((BLOCK,), tl.int64) + fill, mask=spare < size)


def _nonzero_static(x: torch.Tensor, size: int, fill_value: int = -1) -> torch.Tensor:
    out = x.new_empty((size, 1), dtype=torch.int64)
    numel = x.numel()
    likeliest = min(max(power_of_two(numel // processors(x.device)), 1024), 8192)
    blocks = dict.fromkeys((likeliest, 512, 1024, 2048, 4096, 8192))
    configs = [Config({"BLOCK": block, "COUNTED": 4096}, 8) for block in blocks]
    config = choose(_nonzero_static_kernel, x.device, (numel, size, x.dtype), configs)
    grid = (-(-numel // config.tiles["BLOCK"]),)
    launch(_nonzero_static_kernel, grid, out, x.contiguous(), numel, size, fill_value, **config.options)
    return out


def _nonzero_static_refuses(x: torch.Tensor, size: int, fill_value: int = -1) -> str | None:
    if x.dim() != 1 or not 0 < x.numel() < 2**31:
        return f"positions are those of a vector, not of {list(x.shape)}"
    return refuse(x) if x.dtype == torch.bool else f"it is of {x.dtype}, not of bool"


_GELU = {"none": "gelu(%0, 1.0)", "tanh": "gelu_tanh(%0, 1.0)"}
FACES: dict[Any, TritonFace] = {
    aten.linear.default: linear_activation.FACE,  # its first three arguments
    aten.conv2d.default: conv_activation.FACE,  # its first seven
    aten.max_pool2d.default: TritonFace(max_pool, refuse_max_pool),
    aten.adaptive_avg_pool2d.default: TritonFace(mean_pool, refuse_mean_pool),
    aten.cat.default: TritonFace(cat, refuse_cat),
    aten.layer_norm.default: TritonFace(_layer_norm, _layer_norm_refuses),
    aten.rms_norm.default: TritonFace(_rms_norm, _rms_norm_refuses),
    aten.softmax.int: TritonFace(_softmax, _softmax_refuses),
    aten.nonzero_static.default: TritonFace(_nonzero_static, _nonzero_static_refuses),
    aten.gelu.default: pointwise.unary(lambda x, approximate="none": _GELU[approximate]),
    aten.silu.default: pointwise.unary(lambda x: "silu(%0, 1.0)"),
}


def triton_face(target: Any) -> TritonFace | None:
    """The kernels for a node's target, one of graphopt's ops or ATen's; None where there are none."""
    op = op_of(target)
    return op.triton if op is not None else FACES.get(target)
