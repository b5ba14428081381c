"""Products with a weight in 4 or 8 bits, a scale a block, in Triton: that of ``block_quantized_linear``.

    out = act((x @ codes.T of each block) * scale of the block, summed over the blocks, + bias)

Codes become numbers of x's type in registers, where whole numbers are exact, and a scale is that of the sums
of its block, in float32: nothing is rounded before the result is. The blocks of a step are a product each, of
which every warp makes its own, and are added up once, at the end.
"""

from __future__ import annotations

import torch

from graphopt.kernels._codes_triton import nibbles, widened
from graphopt.kernels._linear_configs import FEW_ROWS, chip_of
from graphopt.kernels._linear_tile import epilogue, prefetch_weights, tile_of, with_bias
from graphopt.kernels._linear_triton import PREFETCHED, room_for, summed
from graphopt.kernels._quantized_configs import PIECE, block_configs
from graphopt.kernels._triton import (
    as_rows,
    dot,
    jit,
    launch,
    tl,
    triton,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import choose


@jit
def _loaded(ptrs, inside, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What pointers point to, and zeros where that is outside, unless nothing is."""
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=inside, other=0)


@jit
def _block_quantized_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_sn,
    parameter,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    BYTES: tl.constexpr = PIECE * BITS // 8
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pieces = tl.cdiv(K, PIECE)
    depth = tl.cdiv(tl.cdiv(pieces, PIECES), SPLITS) * PIECES
    first = split * depth
    last = tl.minimum(first + depth, pieces)
    if PDL == 2 and PREFETCH:
        prefetch_weights(weight_ptr, columns % N, stride_wn, first * BYTES, last * BYTES, PIECES * BYTES)
    wait_for_inputs(PDL)
    # Rows and columns past the end are taken from the start: read in bounds without a mask, never stored.
    at = tl.arange(0, PIECES)
    row, column = (rows % M).to(tl.int64)[None, :], (columns % N).to(tl.int64)[None, :]
    acc = tl.zeros((PIECES, BLOCK_N, BLOCK_M), tl.float32)
    for piece in range(first, last, PIECES):
        places = (piece + at)[:, None]
        inside = places < last
        code_ptrs = weight_ptr + column * stride_wn + places * BYTES
        code_ptrs = code_ptrs[:, :, None] + tl.arange(0, BYTES)[None, None, :]
        codes = _loaded(code_ptrs, inside[:, :, None], EVEN_K)
        scale = _loaded(scale_ptr + column * stride_sn + places // PER_SCALE, inside, EVEN_K)
        ks = tl.arange(0, PIECE)[None, :, None]
        x_ptrs = (x_ptr + row * stride_xm + places * PIECE)[:, None, :] + ks
        x = _loaded(x_ptrs, inside[:, :, None] & (places[:, :, None] * PIECE + ks < K), EVEN_K)
        if BITS == 8:
            weight = widened(codes, tl.full((1, 1, 1), 128, tl.uint8), dtype)
        else:
            low, high = nibbles(codes, dtype)
            weight = tl.reshape(tl.join(low, high), (PIECES, BLOCK_N, PIECE))
        sums = dot(weight, x, tl.zeros((PIECES, BLOCK_N, BLOCK_M), tl.float32))
        acc += sums * scale.to(tl.float32)[:, :, None]
    sums = tl.trans(tl.sum(acc, 0))
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if SPLITS == 1:
        sums = epilogue(with_bias(sums, bias_ptr, columns, N), parameter, ACTIVATION)
        tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        partial_ptr = out_ptr + split.to(tl.int64) * M * N
        tl.store(partial_ptr + offsets, sums, mask=inside)


def block_quantized_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    *,
    rounds_input: bool = False,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    """The launcher of ``block_quantized_linear``: its arguments and result; x is never rounded."""
    x_MK = as_rows(x)
    (M, K), (N, _, width) = x_MK.shape, weight.shape
    weight, scale = weight.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    block = width * 8 // bits
    piece = min(block, PIECE)
    chip = chip_of(x.device)
    candidates = block_configs(M, N, K, piece, bits, x.element_size(), chip)
    config = choose(
        _block_quantized_kernel, x.device, (M, N, K, x.dtype, bits, block, activation), candidates
    )
    m, n, pieces, splits = (config.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "PIECES", "SPLITS"))
    made = room_for(x, M, N, splits)
    launch(
        _block_quantized_kernel,
        (triton.cdiv(M, m) * triton.cdiv(N, n), splits),
        *(made, x_MK, weight, scale, bias),
        *(M, N, K, x_MK.stride(0), weight.stride(0), scale.stride(0), parameter),
        ACTIVATION=activation,
        BITS=bits,
        PIECE=piece,
        PER_SCALE=block // piece,
        EVEN_K=K % (piece * pieces * splits) == 0,
        PREFETCH=M <= FEW_ROWS and weight.nbytes <= PREFETCHED,
        **config.options,
    )
    out = made if splits == 1 else summed(made, x.new_empty(M, N), bias, activation, parameter)
    return out.view(*x.shape[:-1], N)
