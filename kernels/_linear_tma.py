"""The matrix product whose tiles the tensor memory accelerator (TMA) of sm_90 and later moves.

Its programs may stay on their processors from tile to tile, so that the next tile's factors are on their
way while this one's sums are finished. One that makes a single tile finishes it in the memory of its factors,
which leaves room for a second program on the processor: one multiplies while the other finishes.
"""

from __future__ import annotations

from graphopt.kernels._linear_tile import epilogue, prefetch_weights, tile_of, with_bias, with_residual
from graphopt.kernels._triton import dot, jit, tl, wait_for_all, wait_for_inputs


@jit
def _prefetch_share(  # type: ignore[no-untyped-def]
    weight_ptr,
    M,
    N,
    K,
    stride_wn,
    tiles,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Ask for the weights of a program's first tile, shared out among those that have the same columns."""
    tile_m, tile_n = tile_of(tl.program_id(0) % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    sharers = tl.minimum(tl.cdiv(M, BLOCK_M), GROUP_M)
    share = tl.cdiv(tl.cdiv(depth, BLOCK_K), sharers) * BLOCK_K
    start = tl.program_id(0) // tiles * depth
    first = start + tile_m % GROUP_M * share
    last = tl.minimum(tl.minimum(first + share, start + depth), K)
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    prefetch_weights(weight_ptr, columns, stride_wn, first, last, BLOCK_K)


@jit
def _tma_tile(  # type: ignore[no-untyped-def]
    out_ptr,
    x_desc,
    weight_desc,
    bias_ptr,
    residual_ptr,
    out_desc,
    split,
    tile,
    steps,
    M,
    N,
    stride_rm,
    parameter,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One part of the depth of one tile: finished and stored by TMA, or, one of several, as its sums are."""
    tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        k = (split * steps + step) * BLOCK_K  # past the end TMA reads zeros, and writes nothing
        acc = dot(x_desc.load([row, k]), weight_desc.load([column, k]).T, acc)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    if SPLITS == 1:
        acc = epilogue(with_bias(acc, bias_ptr, columns, N), parameter, ACTIVATION)
        acc = with_residual(acc, residual_ptr, rows, columns, M, N, stride_rm)
        out_desc.store([row, column], acc.to(out_desc.dtype))
    else:
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        offsets = (split.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
        tl.store(out_ptr + offsets, acc, mask=inside)


@jit
def _linear_tma_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    weight_ptr,
    x_desc,
    weight_desc,
    bias_ptr,
    residual_ptr,
    out_desc,
    M,
    N,
    K,
    stride_wn,
    stride_rm,
    parameter,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    RESIDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    if PDL == 2 and PREFETCH:
        depth = steps * BLOCK_K
        _prefetch_share(weight_ptr, M, N, K, stride_wn, tiles, depth, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)
    wait_for_inputs(PDL)
    if RESIDENT:
        for part in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=True):
            _tma_tile(
                out_ptr, x_desc, weight_desc, bias_ptr, residual_ptr, out_desc, part // tiles, part % tiles,
                steps, M, N, stride_rm, parameter, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLITS,
            )  # fmt: skip
    else:
        part = tl.program_id(0)
        _tma_tile(
            out_ptr, x_desc, weight_desc, bias_ptr, residual_ptr, out_desc, part // tiles, part % tiles,
            steps, M, N, stride_rm, parameter, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLITS,
        )  # fmt: skip
