"""Products of float8 rows in Triton: the kernels and launchers of ``quantize_rows`` and ``float8_linear``.

    out = act((codes @ weight.T) * scale * weight_scale + bias)

Two kernels, as in ``_linear_triton.py``: ``_float8_kernel`` takes any sizes, ``_float8_tma_kernel`` moves
tiles with the tensor memory accelerator (TMA) of sm_90 and later.

The tensor cores of sm_90 add float8 products in accumulators of some 14 bits: over a depth of 8192 that is
0.8 % of the largest result off, over 768 0.13 %. Here what they have added after each step of the depth, at
most 128 of them, goes on in float32, which is as exact as float32 throughout (3e-4, float16's own rounding)
and takes (4096, 768) to 3072 with GELU 35.8 us instead of 30.8 (H100).
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.kernels._float8_configs import float8_configs
from graphopt.kernels._linear_configs import EACH, chip_of
from graphopt.kernels._linear_tile import epilogue, tile_of, with_bias
from graphopt.kernels._linear_triton import described, takes_tma
from graphopt.kernels._triton import (
    INTERPRETED,
    as_rows,
    capability,
    constant,
    jit,
    launch,
    processors,
    refuse,
    tl,
    triton,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import choose

WITH_FLOAT8 = (8, 9)  # compute capability of the first GPU that multiplies float8
_STEP = 128  # products along the depth that the tensor cores add up before float32 takes over
_INTERPRETED = constant(INTERPRETED)


@jit
def quantized(x, largest_code, least):  # type: ignore[no-untyped-def]
    """Rows of float32 (R, D) as float8 codes, and the scale of each, (R, 1).

    The bits of magnitudes are in their order as whole numbers, those of NaN above all: it is handed on,
    which the maximum of numbers would not do.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    largest = tl.maximum(bits.to(tl.float32, bitcast=True), least, propagate_nan=tl.PropagateNan.ALL)
    return _rounded(x * tl.div_rn(largest_code, largest)), tl.div_rn(largest, largest_code)


@jit
def _rounded(x):  # type: ignore[no-untyped-def]
    """Float32 of the format's range to the nearest float8, of two that are as near to the even one.

    The interpreter rounds half away from zero, loses carries into the exponent, and knows no NaN: it is given
    numbers that float8 holds exactly. Adding and subtracting 1.5 * 2 ** 23 steps rounds to whole steps.
    """
    if _INTERPRETED:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        many_steps = tl.maximum(power, 0.015625) * 1572864.0  # a step is an eighth of the power of two below
        codes = ((x + many_steps) - many_steps).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(x == x, codes, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@jit
def _dot(x, weight, acc, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """x @ weight + acc; so many products along the depth are added before float32 takes over, 0 for all."""
    if _INTERPRETED:
        return tl.dot(_numbers(x), _numbers(weight), acc, input_precision="ieee")
    if STEP == 0:
        return tl.dot(x, weight, acc)
    return tl.dot(x, weight, acc, max_num_imprecise_acc=STEP)


@jit
def _numbers(codes):  # type: ignore[no-untyped-def]
    """Codes as float32, what is not a number too; for the interpreter, whose float8 ends at 480."""
    bits = codes.to(tl.uint8, bitcast=True) & 0x7F
    return tl.where(bits == 0x7F, float("nan"), codes.to(tl.float32))


@jit
def _finished(  # type: ignore[no-untyped-def]
    acc, scale_ptr, weight_scale_ptr, bias_ptr, rows, columns, M, N, parameter, ACTIVATION: tl.constexpr
):
    """Sums of codes to results, in float32."""
    scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)
    weight_scale = tl.load(weight_scale_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    acc = acc * scale[:, None] * weight_scale[None, :]
    return epilogue(with_bias(acc, bias_ptr, columns, N), parameter, ACTIVATION)


@jit
def _float8_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    parameter,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(PDL)
    # Rows and columns past the end are taken from the start: read in bounds without a mask, never stored.
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm + ks[None, :]
    weight_ptrs = weight_ptr + (columns % N).to(tl.int64)[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k + ks < K)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(k + ks < K)[:, None], other=0.0)
        acc = _dot(x, weight, acc, STEP)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    acc = _finished(acc, scale_ptr, weight_scale_ptr, bias_ptr, rows, columns, M, N, parameter, ACTIVATION)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _float8_tma_kernel(  # type: ignore[no-untyped-def]
    out_desc,
    x_desc,
    weight_desc,
    scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    parameter,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    wait_for_inputs(PDL)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):  # past the end TMA reads zeros
            acc = _dot(x_desc.load([row, k]), weight_desc.load([column, k]).T, acc, STEP)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        acc = _finished(
            acc, scale_ptr, weight_scale_ptr, bias_ptr, rows, columns, M, N, parameter, ACTIVATION
        )
        out_desc.store([row, column], acc.to(out_desc.dtype))


def float8_product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
) -> torch.Tensor:
    """The launcher of ``float8_linear``: its arguments and result."""
    x, weight = as_rows(codes), as_rows(weight)
    (M, K), N = x.shape, weight.shape[0]
    scale, weight_scale = scale.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = codes.new_empty(M, N, dtype=dtype)
    tma = takes_tma(x, weight) and N * dtype.itemsize % 16 == 0
    chip = chip_of(x.device)
    candidates = float8_configs(M, N, dtype.itemsize, chip, tma)
    config = choose(_float8_kernel, x.device, (M, N, K, dtype, tma, activation), candidates)
    constants: dict[str, Any] = {"ACTIVATION": activation, **config.options}
    by_tma = constants.pop("TMA")
    m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
    constants["STEP"] = min(k, _STEP)
    tiles = triton.cdiv(M, m) * triton.cdiv(N, n)
    given = scale, weight_scale, bias, M, N, K
    if by_tma:
        programs = tiles if by_tma == EACH else min(tiles, processors(x.device))
        moved = described(out, m, n), described(x, m, k), described(weight, n, k)
        launch(_float8_tma_kernel, (programs,), *moved, *given, parameter, **constants)
    else:
        constants["EVEN_K"] = K % k == 0
        launch(
            _float8_kernel,
            (tiles,),
            out,
            x,
            weight,
            *given,
            x.stride(0),
            weight.stride(0),
            parameter,
            **constants,
        )
    return out.view(*codes.shape[:-1], N)


def refuse_float8(*tensors: torch.Tensor | None) -> str | None:
    """Why no kernel here can take these tensors, or None: those of ``refuse``, and GPUs without float8."""
    reason = refuse(*tensors)
    if reason is not None or INTERPRETED:
        return reason
    have = next(capability(x.device) for x in tensors if x is not None)
    return None if have >= WITH_FLOAT8 else f"the GPU is sm_{have[0]}{have[1]}: float8 takes sm_89"
