"""The matrix product of sm_90 whose warps have roles, in Gluon: one asks for factors, others multiply.

    out = act(x @ weight.T + bias) + residual

The warp that asks runs ahead by as many steps as shared memory holds, into the next tile too. A block of
Gluon's has a power of two of columns, but a tile here has two of them side by side, 128 + 64 or 128 + 16 or
64 + 32: of one of these an H100 has just work for all its processors where an encoder has 1,024 tokens, and
nine times as much in a batch of 64 images. Either all that multiply make a tile together, or two groups of
four warps make one each, and one multiplies while the other finishes: what an activation costs is then hidden
but for the last tile.

(12608, 768) to 3072 with GELU takes 118 us in turns, 138 together, 125 in ``_linear_tma_kernel``, and
cuBLAS's product alone 106; to 2304, 78 us, cuBLAS 81. (1024, 768) to 3072 with GELU, a tile a processor: 12.6
us together, 14.0 in ``_linear_tma_kernel``, and cuBLAS's product alone 11.2 (H100, float16).

Gluon has no interpreter: what these kernels compute is tested on a GPU only.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.kernels._linear_tile import epilogue, tile_of
from graphopt.kernels._triton import launch, processors, triton, wait_for_all, wait_for_inputs
from graphopt.kernels._tuning import Config

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # no Triton, or one before its Gluon knew these
    gluon = None

AVAILABLE = gluon is not None
DEPTH = 64  # of a step: 128 bytes, what TMA lays out for the tensor cores
# Registers of a thread when it starts, by warps that multiply: they share 64 K with four that ask, or idle.
REGISTERS = {8: 168, 4: 128}
MULTIPLIES, ASKS = 240, 24  # of a thread of either role, which take and leave some of them


def _jit(function: Any) -> Any:
    return function if gluon is None else gluon.jit(function)


if gluon is not None:  # both were renamed in Triton 3.7
    _copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@_jit
def _ask_for_weights(descs, ready, buffers, step, slot, column):  # type: ignore[no-untyped-def]
    """Announce the bytes of a step, and ask for those of them that are weights."""
    x_desc, wide_desc, narrow_desc = descs
    _, wides, narrows = buffers
    bar = ready.index(slot)
    nbytes: gl.constexpr = wide_desc.block_type.nbytes + narrow_desc.block_type.nbytes
    mbarrier.expect(bar, x_desc.block_type.nbytes + nbytes)
    k = step * x_desc.block_type.shape[1]
    _copy_in(wide_desc, [column, k], bar, wides.index(slot))
    _copy_in(narrow_desc, [column + wide_desc.block_type.shape[0], k], bar, narrows.index(slot))


@_jit
def _ask(descs, bars, buffers, sizes, GROUP_M: gl.constexpr, PDL: gl.constexpr):  # type: ignore[no-untyped-def]
    """The role of one warp: every step of every tile into the next slot that is empty.

    The first tile's weights are asked for while the kernel ahead still runs, where they may be.
    """
    x_desc, wide_desc, narrow_desc = descs
    ready, empty, _, _ = bars
    xs, _, _ = buffers
    M, N, steps, tiles = sizes
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    COLUMNS: gl.constexpr = wide_desc.block_type.shape[0] + narrow_desc.block_type.shape[0]
    STAGES: gl.constexpr = xs.shape[0]
    tile_m, tile_n = tile_of(gl.program_id(0), M, N, ROWS, COLUMNS, GROUP_M)
    ahead = gl.minimum(steps, STAGES)
    for step in range(ahead):
        _ask_for_weights(descs, ready, buffers, step, step, tile_n * COLUMNS)
    wait_for_inputs(PDL)
    for step in range(ahead):
        _copy_in(x_desc, [tile_m * ROWS, step * DEPTH], ready.index(step), xs.index(step))
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, M, N, ROWS, COLUMNS, GROUP_M)
        for step in range(steps):
            if turn >= ahead:
                slot = turn % STAGES
                mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
                _ask_for_weights(descs, ready, buffers, step, slot, tile_n * COLUMNS)
                _copy_in(x_desc, [tile_m * ROWS, step * DEPTH], ready.index(slot), xs.index(slot))
            turn += 1


@_jit
def _finish(  # type: ignore[no-untyped-def]
    sums,
    bias_ptr,
    residual_desc,
    out_desc,
    arrived,
    stage,
    row,
    column,
    N,
    parameter,
    ACTIVATION: gl.constexpr,
    layout: gl.constexpr,
    ASKED: gl.constexpr,
):
    """Bias, activation and residual of some columns of a tile, which then leave by way of ``stage``."""
    if bias_ptr is not None:
        columns = column + gl.arange(0, sums.shape[1], gl.SliceLayout(0, layout))
        sums += gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
    sums = epilogue(sums, parameter, ACTIVATION)
    if residual_desc is None or not ASKED:
        tma.store_wait(0)  # what was there has left
    if residual_desc is not None:
        if not ASKED:
            mbarrier.expect(arrived, residual_desc.block_type.nbytes)
            _copy_in(residual_desc, [row, column], arrived, stage)
        mbarrier.wait(arrived, 1 - ASKED)
        sums += stage.load(layout).to(gl.float32)
    stage.store(sums.to(out_desc.dtype))
    fence_async_shared()
    _copy_out(out_desc, [row, column], stage)


@_jit
def _multiply(  # type: ignore[no-untyped-def]
    given,
    wide_stage,
    narrow_stage,
    ACTIVATION: gl.constexpr,
    GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr,
    WARPS: gl.constexpr,
    WHICH: gl.constexpr,
    PDL: gl.constexpr,
):
    """The role of the others: all tiles, or every second one, in turns with those who make the rest.

    A parity tells whether a slot is full only to who saw the fill before: no turn starts ahead of its time.
    """
    wait_for_inputs(PDL)
    bars, buffers, sizes, residual_descs, out_descs, bias_ptr, parameter = given
    ready, empty, turns, arrivals = bars
    xs, wides, narrows = buffers
    M, N, steps, tiles = sizes
    STAGES: gl.constexpr = xs.shape[0]
    ROWS: gl.constexpr = xs.shape[1]
    WIDE: gl.constexpr = wides.shape[1]
    NARROW: gl.constexpr = narrows.shape[1]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, NARROW, 16])
    arrived = arrivals.index(WHICH)
    turn = WHICH * steps
    mine = 0
    for tile in range(gl.program_id(0) + WHICH * gl.num_programs(0), tiles, CONSUMERS * gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, M, N, ROWS, WIDE + NARROW, GROUP_M)
        row, column = tile_m * ROWS, tile_n * (WIDE + NARROW)
        if residual_descs[0] is not None:
            tma.store_wait(0)  # the tile before has left
            mbarrier.expect(arrived, residual_descs[0].block_type.nbytes)
            _copy_in(residual_descs[0], [row, column], arrived, wide_stage)
        if CONSUMERS == 2:
            mbarrier.wait(turns.index(WHICH), (mine & 1) ^ (1 - WHICH))
            mine += 1
        first = gl.zeros((ROWS, WIDE), gl.float32, wide)
        second = gl.zeros((ROWS, NARROW), gl.float32, narrow)
        for step in range(steps):
            slot = turn % STAGES
            mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
            x = xs.index(slot)
            first = warpgroup_mma(x, wides.index(slot).permute((1, 0)), first, is_async=True)
            second = warpgroup_mma(x, narrows.index(slot).permute((1, 0)), second, is_async=True)
            # Two products stay under way: those before them are done with the slot before.
            first, second = warpgroup_mma_wait(num_outstanding=2, deps=(first, second))
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=step > 0)
            turn += 1
        if CONSUMERS == 2:
            mbarrier.arrive(turns.index(1 - WHICH), count=1)
        first, second = warpgroup_mma_wait(num_outstanding=0, deps=(first, second))
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1)
        turn += (CONSUMERS - 1) * steps
        _finish(
            first, bias_ptr, residual_descs[0], out_descs[0], arrived, wide_stage, row, column, N, parameter,
            ACTIVATION, wide, True,
        )  # fmt: skip
        _finish(
            second, bias_ptr, residual_descs[1], out_descs[1], arrived, narrow_stage, row, column + WIDE, N,
            parameter, ACTIVATION, narrow, False,
        )  # fmt: skip
    tma.store_wait(0)


@_jit
def _linear_gluon_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    wide_desc,
    narrow_desc,
    residual_wide_desc,
    residual_narrow_desc,
    out_wide_desc,
    out_narrow_desc,
    bias_ptr,
    M,
    N,
    K,
    parameter,
    ACTIVATION: gl.constexpr,
    GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLIES: gl.constexpr,
    ASKS: gl.constexpr,
    PDL: gl.constexpr,
):
    wait_for_all(PDL)
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    WIDE: gl.constexpr = wide_desc.block_type.shape[0]
    NARROW: gl.constexpr = narrow_desc.block_type.shape[0]
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, DEPTH], x_desc.layout)
    wides = gl.allocate_shared_memory(x_desc.dtype, [STAGES, WIDE, DEPTH], wide_desc.layout)
    narrows = gl.allocate_shared_memory(x_desc.dtype, [STAGES, NARROW, DEPTH], narrow_desc.layout)
    stages = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, ROWS, WIDE], out_wide_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    arrivals = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    for which in gl.static_range(2):
        mbarrier.init(turns.index(which), count=1)
        mbarrier.init(arrivals.index(which), count=1)
    sizes = (M, N, gl.cdiv(K, DEPTH), gl.cdiv(M, ROWS) * gl.cdiv(N, WIDE + NARROW))
    bars, buffers = (ready, empty, turns, arrivals), (xs, wides, narrows)
    descs = (x_desc, wide_desc, narrow_desc)
    residuals, outs = (residual_wide_desc, residual_narrow_desc), (out_wide_desc, out_narrow_desc)
    given = (bars, buffers, sizes, residuals, outs, bias_ptr, parameter)
    # Names and flags are compile-time arguments only where they stand in the call itself.
    if CONSUMERS == 1:
        beside = gl.allocate_shared_memory(x_desc.dtype, [ROWS, NARROW], out_narrow_desc.layout)
        gl.warp_specialize(
            [
                (_multiply, (given, stages.index(0), beside, ACTIVATION, GROUP_M, CONSUMERS, WARPS, 0, PDL)),
                (_ask, (descs, bars, buffers, sizes, GROUP_M, PDL)),
            ],
            [1],
            [ASKS],
        )
    else:  # there is no room for the second part of a tile beside the first one
        one, two = stages.index(0), stages.index(1)
        part, other = one.slice(0, NARROW, dim=1), two.slice(0, NARROW, dim=1)
        gl.warp_specialize(
            [
                (_multiply, (given, one, part, ACTIVATION, GROUP_M, CONSUMERS, WARPS, 0, PDL)),
                (_multiply, (given, two, other, ACTIVATION, GROUP_M, CONSUMERS, WARPS, 1, PDL)),
                (_ask, (descs, bars, buffers, sizes, GROUP_M, PDL)),
            ],
            [4, 1],
            [MULTIPLIES, ASKS],
        )


def product_by_roles(
    x: torch.Tensor,
    weight: torch.Tensor,
    config: Config,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    parameter: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """A finished product: arguments as ``products`` takes them, in half precision, and where it goes.

    Args:
        x: (M, K), that TMA can move.
        weight: (N, K), likewise.
        config: made by ``roles``.
        out: (M, N), written to.
        bias: (N,), or None.
        activation: a name in ``_activations.py``.
        parameter: of the activation.
        residual: (M, N), that TMA can move, or None.

    Returns:
        ``out``.
    """
    (M, K), N = x.shape, weight.shape[0]
    rows, narrow, consumers = (config.tiles[name] for name in ("BLOCK_M", "NARROW", "CONSUMERS"))
    wide = config.tiles["BLOCK_N"] - narrow
    factors = _described(x, rows, DEPTH), _described(weight, wide, DEPTH), _described(weight, narrow, DEPTH)
    added = [None if residual is None else _described(residual, rows, part) for part in (wide, narrow)]
    launch(
        _linear_gluon_kernel,
        (min(triton.cdiv(M, rows) * triton.cdiv(N, wide + narrow), processors(x.device)),),
        *(*factors, *added, _described(out, rows, wide), _described(out, rows, narrow)),
        *(bias, M, N, K, parameter),
        early=(weight,),
        num_warps=config.num_warps,
        registers=REGISTERS[config.num_warps * consumers],
        ACTIVATION=activation,
        GROUP_M=config.tiles["GROUP_M"],
        CONSUMERS=consumers,
        WARPS=config.num_warps,
        STAGES=config.num_stages,
        MULTIPLIES=MULTIPLIES,
        ASKS=ASKS,
    )
    return out


def _described(x: torch.Tensor, *block: int) -> Any:
    """A matrix as TMA sees it, block by block."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.float16)
    return TensorDescriptor.from_tensor(x, list(block), layout)
