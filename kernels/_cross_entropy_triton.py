"""The cross-entropy of a projection in Triton: a product of which no logit is ever written.

    loss_n = log(sum_v(exp(logits_nv - top_n))) + (top_n - logits_n,target_n),    top_n = max_v(logits_nv)

A program makes one tile of logits and keeps of every row its largest logit, the sum of the exponentials
below that, and the target's logit if it has it: of 256 classes 8 bytes, where the logits are 512. A kernel
over rows brings a row's tiles to one maximum and adds them up, one more adds the rows. Each goes in a fixed
order, so that the bits are the same in every run. Logits stay the float32 that they were summed in.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.kernels._linear_configs import EACH, RESIDENT, chip_of, loss_configs
from graphopt.kernels._linear_tile import tile_of, tile_sums, with_bias
from graphopt.kernels._linear_triton import described, takes_tma
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._triton import (
    as_rows,
    dot,
    jit,
    launch,
    processors,
    tl,
    triton,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose, distinct

SUMMED = 4096  # losses that the last kernel's one program adds at a time


@jit
def _base(top):  # type: ignore[no-untyped-def]
    """What is subtracted before the exponential: where all is -inf so far, -inf - -inf would be NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@jit
def _keep(  # type: ignore[no-untyped-def]
    partial_ptr,
    chosen_ptr,
    bias_ptr,
    target_ptr,
    acc,
    tile_m,
    tile_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store what is kept of a tile of logits, the bias still to be added."""
    rows, places = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    columns = tile_n * BLOCK_N + places
    inside = rows < M
    logits = with_bias(acc, bias_ptr, columns, N)
    logits = tl.where((columns < N)[None, :], logits, -float("inf"))
    top = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - _base(top)[:, None]), axis=1)
    size = tl.cast(M, tl.int64)  # one row is a constant, which has no method for it
    partial_ptr += tile_n * size + rows
    tl.store(partial_ptr, top, mask=inside)
    tl.store(partial_ptr + tl.cdiv(N, BLOCK_N) * size, total, mask=inside)
    target = tl.load(target_ptr + rows, mask=inside, other=-1)
    place = target - tile_n * BLOCK_N
    here = (place >= 0) & (place < BLOCK_N)
    is_chosen = places[None, :] == tl.where(here, place, -1).to(tl.int32)[:, None]
    tl.store(chosen_ptr + rows, tl.sum(tl.where(is_chosen, logits, 0.0), axis=1), mask=here)


@jit
def _linear_cross_entropy_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    chosen_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_wk,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(PDL)
    acc = tile_sums(
        x_ptr, weight_ptr, rows, columns, M, N, 0, K, stride_xm, stride_wn, stride_wk,
        EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _keep(partial_ptr, chosen_ptr, bias_ptr, target_ptr, acc, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)


@jit
def _tma_tile(  # type: ignore[no-untyped-def]
    partial_ptr,
    chosen_ptr,
    x_desc,
    weight_desc,
    bias_ptr,
    target_ptr,
    tile,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):  # past the end TMA reads zeros
        acc = dot(x_desc.load([row, k]), weight_desc.load([column, k]).T, acc)
    _keep(partial_ptr, chosen_ptr, bias_ptr, target_ptr, acc, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)


@jit
def _linear_cross_entropy_tma_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    chosen_ptr,
    x_desc,
    weight_desc,
    bias_ptr,
    target_ptr,
    M,
    N,
    K,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Factors moved by TMA; programs go on from tile to tile, or make one each."""
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    if RESIDENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tma_tile(
                partial_ptr, chosen_ptr, x_desc, weight_desc, bias_ptr, target_ptr, tile,
                M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )  # fmt: skip
    else:
        _tma_tile(
            partial_ptr, chosen_ptr, x_desc, weight_desc, bias_ptr, target_ptr, tl.program_id(0),
            M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip


@jit
def _row_losses_kernel(  # type: ignore[no-untyped-def]
    loss_ptr,
    partial_ptr,
    chosen_ptr,
    target_ptr,
    M,
    N,
    parts,
    ignore_index,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes some rows, all tiles of them."""
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < M
    size = tl.cast(M, tl.int64)  # one row is a constant, which has no method for it
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        seen = (part < parts)[:, None] & inside[None, :]
        ptrs = partial_ptr + part[:, None] * size + row[None, :]
        tops = tl.load(ptrs, mask=seen, other=-float("inf"))
        totals = tl.load(ptrs + parts * size, mask=seen, other=0.0)
        highest = tl.maximum(top, tl.max(tops, axis=0))
        base = _base(highest)
        total = total * tl.exp(top - base) + tl.sum(totals * tl.exp(tops - base[None, :]), axis=0)
        top = highest
    target = tl.load(target_ptr + row, mask=inside, other=-1)
    known = (target >= 0) & (target < N)
    chosen = tl.load(chosen_ptr + row, mask=known, other=float("nan"))  # what is no class has no loss
    loss = tl.log(tl.where(inside, total, 1.0)) + (top - chosen)
    loss = tl.where(target == ignore_index, 0.0, loss)
    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=inside)


@jit
def _loss_sum_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    loss_ptr,
    target_ptr,
    M,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes all rows. A mean of none is NaN, as torch has it."""
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    total = tl.zeros((BLOCK_R,), tl.float32)
    count = tl.zeros((BLOCK_R,), tl.int32)
    for first in range(0, M, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        total += tl.load(loss_ptr + row, mask=row < M, other=0.0)
        if MEAN:
            target = tl.load(target_ptr + row, mask=row < M, other=ignore_index)
            count += (target != ignore_index).to(tl.int32)
    out = tl.sum(total)
    if MEAN:
        counted = tl.sum(count).to(tl.float32)
        out = tl.where(counted > 0, out / tl.maximum(counted, 1.0), float("nan"))
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty))


def losses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The launcher of ``linear_cross_entropy``: its arguments, and the result's dtype for ``float32``.

    A target that is no class and not ``ignore_index`` makes its loss, and sum and mean with it, NaN: the GPU
    tells nobody, and torch's own assertion there ends the process.
    """
    x_MK, target = as_rows(x), target.contiguous()
    M, N = x_MK.shape[0], weight.shape[0]
    partial, chosen = _products(x_MK, weight, bias, target)
    parts = partial.shape[1]
    loss = x.new_empty(M, dtype=dtype if reduction == "none" else torch.float32)
    config = choose(_row_losses_kernel, x.device, (M, parts), _row_configs(M, parts))
    grid = (triton.cdiv(M, config.tiles["BLOCK_R"]),)
    args = loss, partial, chosen, target, M, N, parts, ignore_index
    launch(_row_losses_kernel, grid, *args, **config.options)
    if reduction == "none":
        return loss
    out = x.new_empty((), dtype=dtype)
    constants = {"MEAN": reduction == "mean", "BLOCK_R": min(power_of_two(M), SUMMED)}
    launch(_loss_sum_kernel, (1,), out, loss, target, M, ignore_index, num_warps=8, **constants)
    return out


def _products(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of the tiles of logits.

    Args:
        x: (M, K), the last dimension together in memory.
        weight: (N, K), any strides.
        bias: (N,), or None.
        target: (M,), int64, contiguous.

    Returns:
        The largest logit of every row in every column of tiles, and the sum of the exponentials below it,
        (2, tiles, M); and the logits of the targets, (M,), garbage where a target is no class. Both float32.
    """
    (M, K), N = x.shape, weight.shape[0]
    tma = takes_tma(x, weight)
    kernel = _linear_cross_entropy_tma_kernel if tma else _linear_cross_entropy_kernel
    chip = chip_of(x.device)
    whole = weight.stride(1) == 1 and not (x.stride(0) % 16 or weight.stride(0) % 16)
    key = M, N, K, x.dtype, weight.stride(1) == 1, whole, tma
    config = choose(kernel, x.device, key, loss_configs(M, N, x.element_size(), chip, tma, whole))
    m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
    parts, tiles = triton.cdiv(N, n), triton.cdiv(M, m) * triton.cdiv(N, n)
    partial = x.new_empty((2, parts, M), dtype=torch.float32)
    chosen = x.new_empty(M, dtype=torch.float32)
    kept, rest = (partial, chosen), (None if bias is None else bias.contiguous(), target, M, N, K)
    constants: dict[str, Any] = {**config.options}
    tma = constants.pop("TMA")
    constants.pop("SPLITS")
    if tma:
        programs = tiles if tma == EACH else min(tiles, processors(x.device))
        moved = described(x, m, k), described(weight, n, k)
        constants["RESIDENT"] = tma == RESIDENT
        launch(_linear_cross_entropy_tma_kernel, (programs,), *kept, *moved, *rest, **constants)
    else:
        args = *kept, x, weight, *rest, x.stride(0), *weight.stride()
        launch(_linear_cross_entropy_kernel, (tiles,), *args, EVEN_K=K % k == 0, **constants)
    return partial, chosen


def _row_configs(rows: int, parts: int) -> tuple[Config, ...]:
    """Few rows a program and many tiles at a time: a turn waits for its loads."""
    shapes = (16, 128, 4), (8, 256, 4), (32, 64, 4), (8, 128, 4), (4, 256, 4)
    most, longest = power_of_two(rows), power_of_two(parts)
    found = [Config({"BLOCK_R": min(r, most), "BLOCK_P": min(p, longest)}, warps) for r, p, warps in shapes]
    return distinct(found)
