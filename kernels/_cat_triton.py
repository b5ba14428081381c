"""Tensors side by side, in Triton: the launcher of ``aten.cat``.

A tensor is copied as rows, of all that lies together behind the dimension that grows: one launch a tensor.
PyTorch's own kernel divides for the place of every element. (64, 1, 768) and (64, 196, 768) in float16, a
ViT's class token before its patches, take it 52 us on an H100, where they take 13 us at 3 TB/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.kernels._rows import power_of_two
from graphopt.kernels._shape import is_channels_last
from graphopt.kernels._triton import (
    jit,
    last_contiguous,
    launch,
    refuse,
    tl,
    triton,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

_MOST = 8  # tensors: each is a launch
_BYTES = 16384  # of a program's tile
_LONGEST = 2**31  # elements of a row: places inside of one are counted in 32 bits


@jit
def _copy_rows_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    rows,
    length,
    stride_or,
    stride_xr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    there = (row < rows) & (column < length)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + row.to(tl.int64) * stride_xr + column, mask=there)
    tl.store(out_ptr + row.to(tl.int64) * stride_or + column, x, mask=there)


def cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The arguments and the result of ``aten.cat``, its memory format included."""
    dim %= tensors[0].dim()
    if all(is_channels_last(x) for x in tensors):
        # Pixels as rows of channels: images, then height and width, then the channels.
        order = [0, *range(2, tensors[0].dim()), 1]
        beside = _side_by_side([x.permute(order) for x in tensors], order.index(dim))
        return beside.permute([order.index(place) for place in range(len(order))])
    return _side_by_side(tensors, dim)


def _side_by_side(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The tensors along a dimension, contiguous."""
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    out = tensors[0].new_empty(shape)
    rows = math.prod(shape[:dim])
    out_RD = out.view(rows, math.prod(shape[dim:]))
    start = 0
    for x in tensors:
        length = math.prod(x.shape[dim:])
        x_RD = last_contiguous(x.reshape(rows, length))
        beside = out_RD[:, start : start + length]
        start += length
        config = choose(_copy_rows_kernel, x.device, (rows, length, x.dtype), _tiles(length, x.itemsize))
        grid = triton.cdiv(rows, config.tiles["BLOCK_R"]), triton.cdiv(length, config.tiles["BLOCK_D"])
        strides = beside.stride(0), x_RD.stride(0)
        launch(_copy_rows_kernel, grid, beside, x_RD, rows, length, *strides, **config.options)
    return out


def _tiles(length: int, itemsize: int) -> list[Config]:
    """How rows are cut up, the likeliest first: long ones into pieces, short ones several to a program."""
    found = []
    for bytes_, warps in ((_BYTES, 8), (_BYTES // 2, 4), (_BYTES * 2, 8), (_BYTES // 4, 4)):
        width = min(power_of_two(length), bytes_ // itemsize)
        found.append(Config({"BLOCK_R": bytes_ // itemsize // width, "BLOCK_D": width}, warps))
    return found


def refuse_cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> str | None:
    """Why these tensors are left to ATen, or None."""
    if not 0 < len(tensors) <= _MOST:
        return f"{len(tensors)} tensors are as many launches"
    dtypes, ranks = {x.dtype for x in tensors}, {x.dim() for x in tensors}
    if len(dtypes) > 1 or len(ranks) > 1 or 0 in ranks:
        return "the tensors differ in dtype or rank"
    if tensors[0].dtype.is_complex:
        return f"kernels know no {tensors[0].dtype}"
    if any(x.numel() == 0 for x in tensors):
        return "a tensor is empty"
    if any(math.prod(x.shape[dim % x.dim() :]) >= _LONGEST for x in tensors):
        return "a row has 2**31 elements or more"
    last = {is_channels_last(x) for x in tensors}
    if len(last) > 1 or (not last.pop() and not all(_in_order(x) for x in tensors)):
        return "what memory format the result has is ATen's to say"
    return refuse(*tensors)


def _in_order(x: torch.Tensor) -> bool:
    """Whether no dimension lies closer together than one behind it: the result of such is contiguous."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and stride > 0]
    return strides == sorted(strides, reverse=True)
