"""What kernels over rows share: how a tensor is seen as rows, how many a program takes, and the statistics.

A program holds whole rows in registers, so that a row is read once; that bounds its length.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from graphopt.kernels._triton import as_rows, jit, last_contiguous, launch, processors, tl
from graphopt.kernels._tuning import Config, choose

LONGEST = 32768  # elements of a row: 32 float32 registers a thread of 32 warps


def refuse_row(length: int) -> str | None:
    """Why a row is too long for a program to hold, or None."""
    return f"a row has {length} elements, more than {LONGEST}" if length > LONGEST else None


def row_configs(rows: int, length: int, device: torch.device, inputs: int = 1) -> tuple[Config, ...]:
    """How many rows a program takes and with how many warps, the likeliest first.

    Args:
        rows: of the tensor.
        length: of a row.
        device: that the kernel runs on.
        inputs: tensors of that shape that are read.
    """
    return _row_configs(rows, length, processors(device), inputs)


@functools.lru_cache(maxsize=1024)
def _row_configs(rows: int, length: int, processors: int, inputs: int) -> tuple[Config, ...]:
    block = power_of_two(length)
    # As tuning found on an H100, float16: few rows are fastest one to a warp, which waits for no other (128
    # rows of 768: 1.56 us against 1.70 with four warps); many with 32 bytes a thread on the way, of all
    # inputs together (65536 of 768: 68.2 us against 77.2 with 16). Short rows are taken together, while there
    # remain a few programs for every processor.
    together = max(1, min(2048 // block, rows // (4 * processors)))
    together = 2 ** int(math.log2(together))
    each = 16 if rows > 16 * processors else 32
    first = _row_config(together, block, max(each // inputs, 8))
    others = [_row_config(r, block, each) for r in {1, 2, 4, together} for each in (4, 8, 16, 32)]
    kept = [config for config in others if config.tiles["BLOCK_R"] * block <= LONGEST and config != first]
    return (first, *(config for place, config in enumerate(kept) if config not in kept[:place]))


def _row_config(together: int, block: int, each: int) -> Config:
    warps = power_of_two(together * block // (32 * each))
    return Config({"BLOCK_R": together, "BLOCK_D": block}, min(max(warps, 1), 16 if each < 32 else 32))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least this; 1 for nothing."""
    return 1 << max(number - 1, 0).bit_length()


def launch_with_residual(
    kernel: Any,
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    residual: torch.Tensor,
    vectors: tuple[torch.Tensor | None, ...],
    *numbers: float,
) -> None:
    """Start a kernel over the rows of x and of a residual that broadcasts to it.

    Args:
        kernel: takes pointers of results, x, residual and vectors; rows, x's stride, and the residual's
            layout as ``broadcast_rows`` says it; the numbers; and D, PERIODIC and the tiles.
        results: of x's shape, contiguous.
        x: (..., D).
        residual: a shape that broadcasts to x's.
        vectors: (D,), read before the kernel waits for its inputs; None where there is none.
        numbers: whatever the kernel takes besides.
    """
    x_RD = as_rows(x)
    rows, features = x_RD.shape
    wide, *layout = broadcast_rows(residual, x.shape)
    periodic = layout[0] < rows
    near = tuple(None if v is None else v.contiguous() for v in vectors)
    dtypes = x.dtype, residual.dtype, *(None if v is None else v.dtype for v in near)
    configs = row_configs(rows, features, x.device, inputs=2)
    config = choose(kernel, x.device, (rows, features, *dtypes, periodic), configs)
    grid = (-(-rows // config.tiles["BLOCK_R"]),)
    args = (*results, x_RD, wide, *near, rows, x_RD.stride(0), *layout, *numbers)
    launch(kernel, grid, *args, early=near, D=features, PERIODIC=periodic, **config.options)


def broadcast_rows(x: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, int, int, int]:
    """A tensor expanded to (..., D), as rows that two strides find.

    Row i lies ``i // inner * outer_stride + i % inner * inner_stride`` elements in, with all rows inner where
    one stride finds them. Other layouts are copied.

    Returns:
        The tensor to take the pointer of, inner, the outer and the inner stride.
    """
    wide = last_contiguous(x.expand(shape))
    merged: list[list[int]] = []  # size and stride, outermost first
    for size, stride in zip(wide.shape[:-1], wide.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if len(merged) > 2:
        wide = wide.contiguous()
        merged = [[math.prod(shape[:-1]), shape[-1]]]
    (_, outer), (inner, step) = [[1, 0], [1, 0], *merged][-2:]
    return wide, inner, outer, step


@jit
def row_tile(rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows (R, 1), features (1, D), and which of them there are.

    Rows are numbered in 32 bits, since dividing in 64 takes longer than all the rest of a short row.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    return row, column, (row < rows) & (column < D)


@jit
def broadcast_tile(  # type: ignore[no-untyped-def]
    ptr, row, column, seen, inner, stride_outer, stride_inner, PERIODIC: tl.constexpr
):
    """The tile of a tensor laid out as ``broadcast_rows`` says, in float32."""
    if PERIODIC:
        start = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    else:
        start = row.to(tl.int64) * stride_inner
    return tl.load(ptr + start + column, mask=seen, other=0.0).to(tl.float32)


@jit
def row_pointers(ptr, row, column, stride):  # type: ignore[no-untyped-def]
    """Of a tile of rows that lie a stride apart."""
    return ptr + row.to(tl.int64) * stride + column


@jit
def vector(ptr, column, D: tl.constexpr, default: tl.constexpr):  # type: ignore[no-untyped-def]
    """A value a feature, (1, D) in float32; the default where there is no vector."""
    if ptr is not None:
        value = tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)
    else:
        value = tl.full(column.shape, default, tl.float32)
    return value


@jit
def centred_and_scaled(x, seen, D: tl.constexpr, eps):  # type: ignore[no-untyped-def]
    """(x - mean) / sqrt(var + eps) of rows in float32; the variance is that of the differences."""
    mean = tl.sum(tl.where(seen, x, 0.0), axis=1, keep_dims=True) / D
    centred = tl.where(seen, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / D
    return centred * tl.rsqrt(variance + eps)


@jit
def scaled(x, seen, D: tl.constexpr, eps):  # type: ignore[no-untyped-def]
    """x / sqrt(mean(x**2) + eps) of rows in float32."""
    kept = tl.where(seen, x, 0.0)
    return kept * tl.rsqrt(tl.sum(kept * kept, axis=1, keep_dims=True) / D + eps)


@jit
def trues_before(mask_ptr, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of a mask's elements in front of one are not zero, so many read at a time.

    Every program that asks reads all of them: of 16384 that is 16 KB from L2, which takes less than a kernel
    of its own that counts for all.
    """
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found += (tl.load(mask_ptr + at, mask=at < end, other=0) != 0).to(tl.int32)
    return tl.sum(found)
