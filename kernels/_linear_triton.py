"""Matrix products with their epilogue in Triton: the kernels and launchers that several ops share.

    out = act(x @ weight.T + bias) + residual

Inputs are multiplied as they are and summed in float32; bias, activation and residual are applied to those
sums, and the result is rounded once. ``_linear_configs.py`` chooses the tiles.

Four kernels. ``_linear_kernel`` takes any strides, that of ``_linear_tma.py`` what the tensor memory
accelerator can move. Where a product has too few tiles to fill the GPU both cut its depth K into parts, whose
sums in float32 a third kernel adds in the order of their depth: the same bits in every run, unlike atomic
additions in memory. That of ``_linear_gluon.py`` makes large tiles on sm_90.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.kernels._linear_configs import (
    BY_CUBLAS,
    EACH,
    FEW_ROWS,
    RESIDENT,
    ROLES,
    chip_of,
    linear_configs,
)
from graphopt.kernels._linear_gluon import product_by_roles
from graphopt.kernels._linear_tile import (
    epilogue,
    prefetch_weights,
    tile_of,
    tile_sums,
    with_bias,
    with_residual,
)
from graphopt.kernels._linear_tma import _linear_tma_kernel
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._triton import (
    as_rows,
    capability,
    jit,
    launch,
    processors,
    refuse,
    stand_in,
    tl,
    triton,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

WITH_TMA = (9, 0)
PREFETCHED = 2**24  # bytes of weights that are brought into L2 while the kernel ahead still runs


@jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_rm,
    parameter,
    ACTIVATION: tl.constexpr,
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
    acc = tile_sums(
        x_ptr, weight_ptr, rows, columns, M, N, first, last, stride_xm, stride_wn, stride_wk,
        EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if SPLITS == 1:
        acc = epilogue(with_bias(acc, bias_ptr, columns, N), parameter, ACTIVATION)
        acc = with_residual(acc, residual_ptr, rows, columns, M, N, stride_rm)
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        partial_ptr = out_ptr + split.to(tl.int64) * M * N
        tl.store(partial_ptr + offsets, acc, mask=inside)


@jit
def _split_sum_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    partial_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    stride_rm,
    parameter,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    rows = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    size = tl.cast(M, tl.int64) * N  # one row is a constant, which has no method for it
    acc = sum_splits(partial_ptr, offsets, (columns < N)[None, :], size, SPLITS)
    acc = epilogue(with_bias(acc, bias_ptr, columns, N), parameter, ACTIVATION)
    acc = with_residual(acc, residual_ptr, rows, columns, M, N, stride_rm)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(columns < N)[None, :])


@jit
def sum_splits(partial_ptr, offsets, inside, size, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums over all parts of the depth, each of ``size`` elements, in the order of their depth."""
    acc = tl.load(partial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(partial_ptr + split * size + offsets, mask=inside, other=0.0)
    return acc


def room_for(x: torch.Tensor, M: int, N: int, splits: int) -> torch.Tensor:
    """Where products go: (M, N) of x's dtype, or, cut along their depth, (splits, M, N) in float32."""
    return x.new_empty(M, N) if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)


def products(
    x: torch.Tensor,
    weight: torch.Tensor,
    config: Config,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The products of rows and weights: finished, or for another kernel to finish.

    Args:
        x: (M, K), the last dimension together in memory.
        weight: (N, K), any strides; with TMA as ``takes_tma`` says, and x likewise.
        config: of ``_linear_configs.py``.
        bias: (N,), for finished products only, as are the following.
        activation: a name in ``_activations.py``.
        parameter: of the activation.
        residual: (M, N), the last dimension together in memory.

    Returns:
        (M, N) of x's dtype, finished or by cuBLAS; or partial sums, (SPLITS, M, N) in float32.
    """
    if config == BY_CUBLAS:
        return x @ weight.T
    (M, K), N = x.shape, weight.shape[0]
    constants: dict[str, Any] = {"ACTIVATION": activation, **config.options}
    tma, splits = constants.pop("TMA"), config.tiles["SPLITS"]
    out = room_for(x, M, N, splits)
    if tma == ROLES:
        if residual is not None and not takes_tma(residual, residual):
            residual = residual.contiguous()
        return product_by_roles(x, weight, config, out, bias, activation, parameter, residual)
    stride_rm = 0 if residual is None else residual.stride(0)
    m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
    few = M <= FEW_ROWS
    if tma:
        constants["PREFETCH"] = few or weight.nbytes <= PREFETCHED
        constants["RESIDENT"] = tma == RESIDENT
        parts = splits * triton.cdiv(M, m) * triton.cdiv(N, n)
        programs = parts if tma == EACH else min(parts, processors(x.device))
        moved = described(x, m, k), described(weight, n, k)
        result = described(out, m, n) if splits == 1 else None
        numbers = M, N, K, weight.stride(0), stride_rm, parameter
        args = out, weight, *moved, bias, residual, result
        launch(_linear_tma_kernel, (programs,), *args, *numbers, **constants)
        return out
    strides = x.stride(0), weight.stride(0), weight.stride(1), stride_rm
    constants["PREFETCH"], constants["EVEN_K"] = few and weight.stride(1) == 1, K % (k * splits) == 0
    grid = triton.cdiv(M, m) * triton.cdiv(N, n), splits
    launch(_linear_kernel, grid, x, weight, bias, residual, out, M, N, K, *strides, parameter, **constants)
    return out


def described(x: torch.Tensor, *block: int) -> Any:
    """A matrix as TMA sees it, block by block."""
    return TensorDescriptor.from_tensor(x, list(block))


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The launcher of ``linear_activation``, and of ``aten.linear``: their arguments and result."""
    x_MK = as_rows(x)
    residual_MN = None if residual is None else as_rows(residual)
    (M, _), N = x_MK.shape, weight.shape[0]
    bias_N = None if bias is None else bias.contiguous()
    finished = residual is not None or activation != "none"
    config = chosen(x_MK, weight, finished=finished, residual=residual is not None)
    if config.tiles.get("SPLITS") == 1:
        out = products(x_MK, weight, config, bias_N, activation, parameter, residual_MN)
    else:
        partial = products(x_MK, weight, config)
        out = summed(partial, x.new_empty(M, N), bias_N, activation, parameter, residual_MN)
    return out.view(*x.shape[:-1], N)


def summed(
    partial: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Products that were cut along their depth, added up and finished.

    Args:
        partial: (parts, M, N), float32; or (M, N), of whole products.
        out: (M, N), written to.
        bias: as ``products`` takes them, and all that follow.
        activation: of the sums.
        parameter: of the activation.
        residual: added last.

    Returns:
        ``out``.
    """
    M, N = out.shape
    parts = partial.shape[0] if partial.dim() == 3 else 1
    block = min(power_of_two(N), 1024)
    stride = 0 if residual is None else residual.stride(0)
    args = out, partial, bias, residual, M, N, stride, parameter
    cut = {"SPLITS": parts, "BLOCK_N": block}
    launch(_split_sum_kernel, (M, triton.cdiv(N, block)), *args, ACTIVATION=activation, **cut)
    return out


def chosen(
    x: torch.Tensor, weight: torch.Tensor, finished: bool, then_summed: bool = False, residual: bool = False
) -> Config:
    """The configuration for a product.

    Args:
        x: (M, K).
        weight: (N, K).
        finished: whether something is done to the product.
        then_summed: whether by a kernel that adds up partial sums at no cost.
        residual: whether one is added in the product's own kernel.
    """
    (M, K), N = x.shape, weight.shape[0]
    tma = takes_tma(x, weight)
    chip = chip_of(x.device)
    by = ROLES if tma and chip.wgmma else tma
    named = M, N, K, x.dtype, weight.stride(1) == 1, by, finished, then_summed, residual
    candidates = linear_configs(M, N, K, x.element_size(), chip, tma, then_summed, finished, residual)
    return choose(_linear_tma_kernel if tma else _linear_kernel, x.device, named, candidates)


def takes_tma(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether TMA can move the tiles: on sm_90, nothing empty, rows together and on 16 bytes."""
    if capability(x.device) < WITH_TMA or 0 in (*x.shape, *weight.shape):
        return False
    addresses = [t.stride(0) * t.element_size() for t in (x, weight)]
    if stand_in() is None:  # a fake tensor has no address, and PyTorch's allocator aligns all of them
        addresses += [t.data_ptr() for t in (x, weight)]
    together = all(t.stride(1) == 1 for t in (x, weight))
    return together and not any(n % 16 for n in (*addresses, weight.shape[0] * x.element_size()))


def refuse_product(x: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why no kernel here should take these factors and vectors, the rows first, or None."""
    reason = refuse(x, *others)
    if reason is None and x.dtype == torch.float32 and x.device.type == "cuda":
        return "in float32 an exact product has no tensor cores, and TF32 is not exact: cuBLAS is as good"
    if reason is None and x.shape[-1] == 0:
        return "the product has no depth"
    return reason
