"""Products with a weight in 8 bits in Triton: the kernel and the launcher of ``quantized_linear``.

    out = (x @ (weight - zero_point).T) * scale + bias

A weight is read as bytes, and becomes a number of x's type in registers: whole numbers up to 256 are exact in
every type. The products are summed in float32, and the scale of an output is that of its sums, which rounds
once where a scaled weight would be rounded first.

Tiles are those of the transposed product, weight @ x.T: the tensor cores of sm_90 take the first factor from
registers, where the weight is widened, and the second one from shared memory, where x has come to.
"""

from __future__ import annotations

import torch

from graphopt.kernels._codes_triton import widened
from graphopt.kernels._linear_configs import FEW_ROWS, chip_of
from graphopt.kernels._linear_tile import prefetch_weights, tile_of, with_bias
from graphopt.kernels._linear_triton import PREFETCHED, room_for, summed
from graphopt.kernels._quantized_configs import quantized_configs
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
def _quantized_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    first = split * depth
    last = tl.minimum(first + depth, K)
    if PDL == 2 and PREFETCH:
        prefetch_weights(weight_ptr, columns % N, stride_wn, first, last, BLOCK_K)
    wait_for_inputs(PDL)
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + columns % N)[:, None]
    else:
        zero = tl.zeros((BLOCK_N, 1), tl.int8)
    # Rows and columns past the end are taken from the start: read in bounds without a mask, never stored.
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[None, :] * stride_xm + (first + ks)[:, None]
    weight_ptrs = (
        weight_ptr + (columns % N).to(tl.int64)[:, None] * stride_wn + (first + ks)[None, :] * stride_wk
    )
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first, last, BLOCK_K):
        if EVEN_K:
            x, codes = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:  # what is past the end of x is zero, whatever the weight is there
            x = tl.load(x_ptrs, mask=(k + ks < last)[:, None], other=0.0)
            codes = tl.load(weight_ptrs, mask=(k + ks < last)[None, :], other=0)
        acc = dot(widened(codes, zero, x_ptr.dtype.element_ty), x, acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_wk
    acc = tl.trans(acc * tl.load(scale_ptr + columns % N).to(tl.float32)[:, None])
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if SPLITS == 1:
        acc = with_bias(acc, bias_ptr, columns, N)
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        partial_ptr = out_ptr + split.to(tl.int64) * M * N
        tl.store(partial_ptr + offsets, acc, mask=inside)


def quantized_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """The launcher of ``quantized_linear``: its arguments and result."""
    x_MK = as_rows(x)
    (M, K), N = x_MK.shape, weight.shape[0]
    scale = scale.contiguous()
    bias, zero_point = (v if v is None else v.contiguous() for v in (bias, zero_point))
    together, offset = weight.stride(1) == 1, zero_point is not None
    chip = chip_of(x.device)
    candidates = quantized_configs(M, N, K, x.element_size(), chip)
    named = M, N, K, x.dtype, weight.dtype, together, offset
    config = choose(_quantized_kernel, x.device, named, candidates)
    m, n, k, splits = (config.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS"))
    made = room_for(x, M, N, splits)
    launch(
        _quantized_kernel,
        (triton.cdiv(M, m) * triton.cdiv(N, n), splits),
        *(made, x_MK, weight, scale, zero_point, bias),
        *(M, N, K, x_MK.stride(0), *weight.stride()),
        EVEN_K=K % (k * splits) == 0,
        PREFETCH=M <= FEW_ROWS and together and weight.nbytes <= PREFETCHED,
        **config.options,
    )
    out = made if splits == 1 else summed(made, x.new_empty(M, N), bias)
    return out.view(*x.shape[:-1], N)
