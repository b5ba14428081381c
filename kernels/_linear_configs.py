"""Tiles for matrix products, chosen by shape.

The times are of one H100, float16, in CUDA graphs of 8 or 24 launches that each wait for the one before, with
weights of their own: 24 x 3.5 MB, more than the L2 cache holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from graphopt.kernels._linear_gluon import AVAILABLE, DEPTH
from graphopt.kernels._triton import capability, processors, shared_memory
from graphopt.kernels._tuning import Config

FEW_ROWS = 256  # up to which a product waits for its weights more than for anything else
MANY_ROWS = 4096  # from which on a product has several rounds of tiles, and cuBLAS is the faster one
# With TMA: a program goes on from tile to tile, or each tile has its own, or its warps have roles.
RESIDENT, EACH, ROLES = 1, 2, 3
DEEPEST = 384  # no part of the depth is cut to less
MOST_PARTS = 8
AMPERES = 163 * 1024  # bytes of shared memory, the most of a GPU before sm_90
BY_CUBLAS = Config({"CUBLAS": 1})  # the product is cuBLAS's, and a kernel here finishes it


@dataclass(frozen=True)
class Chip:
    """What tiles must fit.

    Args:
        processors: that run programs.
        shared: bytes of shared memory that a program may have.
        wgmma: whether it has the instructions of sm_90, by which a warp group multiplies.
    """

    processors: int
    shared: int
    wgmma: bool = False


def chip_of(device: torch.device) -> Chip:
    """What a device has; an H100's for what is no GPU."""
    return Chip(processors(device), shared_memory(device), AVAILABLE and capability(device) == (9, 0))


def tiles(m: int, n: int, k: int, warps: int, stages: int, splits: int = 1, group: int = 8) -> Config:
    """A configuration of ``_linear_kernel``.

    Args:
        m: rows of a tile.
        n: columns of a tile.
        k: depth of one step.
        warps: of a program.
        stages: steps whose tiles are on their way at a time.
        splits: parts that the depth is cut into, each summed by a program of its own.
        group: row tiles that are walked through before the next column tile: they share its weights in L2.
    """
    cut = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "SPLITS": splits, "TMA": 0}
    return Config(cut, warps, stages)


def tma_tiles(
    m: int,
    n: int,
    k: int,
    warps: int,
    stages: int,
    splits: int = 1,
    group: int = 8,
    tma: int = RESIDENT,
) -> Config:
    """A configuration of ``_linear_tma_kernel``, whose programs are RESIDENT or EACH tile's."""
    found = tiles(m, n, k, warps, stages, splits, group)
    return Config({**found.tiles, "TMA": tma}, warps, stages)


def roles(m: int, wide: int, narrow: int, consumers: int = 1, stages: int = 4, group: int = 8) -> Config:
    """A configuration of ``_linear_gluon_kernel``.

    Args:
        m: rows of a tile.
        wide: its first columns, a power of two.
        narrow: those beside them, another one.
        consumers: 1 where all warps that multiply make one tile together, 2 where four and four take turns.
        stages: steps whose tiles are on their way at a time.
        group: row tiles as ``tiles`` takes them.
    """
    found = tiles(m, wide + narrow, DEPTH, 4 if consumers == 2 else m // 16, stages, group=group)
    return Config(
        {**found.tiles, "TMA": ROLES, "NARROW": narrow, "CONSUMERS": consumers}, found.num_warps, stages
    )


@functools.lru_cache(maxsize=1024)
def linear_configs(
    M: int,
    N: int,
    K: int,
    itemsize: int,
    chip: Chip,
    tma: bool,
    then_summed: bool,
    finished: bool,
    residual: bool = False,
) -> tuple[Config, ...]:
    """How a product may be cut up, the likeliest first.

    Args:
        M: rows of x.
        N: rows of the weight.
        K: columns of both.
        itemsize: bytes of an element.
        chip: what the tiles must fit.
        tma: whether they may be moved by TMA.
        then_summed: whether a kernel follows that adds up partial sums at no cost.
        finished: whether the product alone is not all, so that cuBLAS's needs a kernel after it.
        residual: whether the kernel adds one.
    """
    few = M <= FEW_ROWS
    found = _few_rows(M, N, K, chip, tma, then_summed) if few else _many_rows(M, N, K, itemsize, chip, tma)
    found += (tiles(64, 64, 32, 4, 3), tiles(32, 32, 32, 4, 2))  # small enough for every GPU, in float32 too
    fitting = tuple(config for config in found if _shared(config, itemsize, residual=residual) <= chip.shared)
    if not finished:
        return fitting
    # Many rows keep cuBLAS busier than most tiles here, and a norm reads the product from L2 either way.
    # Warps with roles add the residual as well: (12608, 768) to 768 and the norm take 46.5 us, with cuBLAS
    # 51.1, but (12608, 3072) to 768 113 and 110.
    by_cublas = then_summed and M >= MANY_ROWS and (fitting[0].tiles["TMA"] != ROLES or K >= 2048)
    return (BY_CUBLAS, *fitting) if by_cublas else (*fitting, BY_CUBLAS)


def _few_rows(M: int, N: int, K: int, chip: Chip, tma: bool, then_summed: bool) -> tuple[Config, ...]:
    """Deep steps, many on their way, and the depth cut where the tiles alone leave processors idle.

    (128, 768) to 2304, 4.31 us, cuBLAS 5.31: 64x64x128, 6 stages. To 3072 with GELU, 4.92 us, cuBLAS and a
    kernel for GELU 7.70: 4 stages. To 768, norm included, 4.26 us, cuBLAS and the same norm 6.39: 2 parts.
    (128, 3072) to 768 likewise, 6.45 us against 9.86: 4 parts.
    """
    m = 64 if M > 32 else 32 if M > 16 else 16
    worth = then_summed or K >= 2048  # else the kernel that adds up takes longer than it saves
    parts = parts_of_depth(-(-M // m) * -(-N // 64), K, chip) if worth else 1
    narrow = parts_of_depth(-(-M // m) * -(-N // 32), K, chip) if worth else 1
    by_pointer = (
        tiles(m, 64, 128, 4, 4, parts),
        tiles(m, 32, 128, 4, 4, narrow),
        tiles(m, 64, 128, 4, 3, parts),
        tiles(m, 32, 256, 4, 2, narrow),
    )
    if not tma:
        return by_pointer
    stages = 6 if parts == 1 else 4
    by_tma: tuple[Config, ...] = (
        tma_tiles(m, 64, 128, 4, stages, parts, tma=EACH),
        tma_tiles(m, 64, 128, 4, stages, parts),  # the same programs, compiled as a loop over tiles
        tma_tiles(m, 64, 256, 4, 3, parts, tma=EACH),
        tma_tiles(m, 32, 256, 4, 3, narrow, tma=EACH),
        tma_tiles(m, 64, 128, 4, 10 - stages, parts, tma=EACH),
    )
    if M > 128:  # where tiles of 64 rows are more than the processors, those of 128 may be one round
        tall = parts_of_depth(-(-M // 128) * -(-N // 64), K, chip) if worth else 1
        by_tma += tma_tiles(128, 64, 128, 4, 3, tall, tma=EACH), tma_tiles(128, 64, 64, 8, 5, tall, tma=EACH)
    return by_tma + by_pointer[:2]


def parts_of_depth(whole: int, K: int, chip: Chip) -> int:
    """Parts of the depth so that as many programs as processors have work, and each enough of it."""
    wanted = min(chip.processors // max(whole, 1), K // DEEPEST, MOST_PARTS)
    return 1 << max(wanted, 1).bit_length() - 1


def _many_rows(M: int, N: int, K: int, itemsize: int, chip: Chip, tma: bool) -> tuple[Config, ...]:
    """The largest tile of which the last round of programs is not mostly idle; then the others.

    (4096, 768) to 3072 with GELU, 38.5 us, cuBLAS alone 36.1 and with a kernel for GELU 50.0: 128x256. (1024,
    768) to 768, the norm included, 6.9 us, cuBLAS and the same norm 8.6: 64x128. Where tiles of 128x128 are
    more than the processors, but not twice as many, two share one: (1024, 768) to 3072 with GELU 13.3 us,
    128x256 14.6; (4096, 768) to 768, residual and norm included, 16.5 us, cuBLAS and the same norm 17.9.

    The product alone cuBLAS makes faster than these: (1024, 768) to 2304 in 9.2 us against 11.1, (4096, 768)
    to 2304 in 25.5 us against 30.3, and (4096, 3072) to 768 with the norm in 36.9 us against 42.9. On sm_90
    warps with roles are as fast (``_linear_gluon.py``). Triton 3.9 does not give them roles by itself there;
    without, 128x192 takes 37.1 us where 128x256 takes 31.9, and 128x256 for EACH tile 39.9 us.
    """
    if not tma:
        return (
            tiles(128, 128, 64, 8, 3),
            tiles(64, 128, 64, 4, 4),
            tiles(128, 64, 64, 4, 3),
            tiles(64, 64, 64, 4, 4),
        )
    shared = tma_tiles(128, 128, 64, 4, 3, tma=EACH)
    found = [
        tma_tiles(128, 256, 64, 8, 3),
        tma_tiles(128, 128, 64, 4, 4),
        tma_tiles(64, 128, 128, 4, 4),
        tma_tiles(64, 256, 64, 4, 4),
        tma_tiles(128, 128, 64, 8, 4),
        shared,
    ]
    in_one_round = chip.processors < _tiles(shared, M, N) <= 2 * chip.processors
    likely = next((c for c in found if _busy(c, M, N, chip) >= 0.7), found[2])
    likely = shared if in_one_round else likely
    others = (*(config for config in found if config != likely),)
    return (
        _with_roles((likely, *others), M, N, K, chip) if chip.wgmma and itemsize == 2 else (likely, *others)
    )


def _with_roles(found: tuple[Config, ...], M: int, N: int, K: int, chip: Chip) -> tuple[Config, ...]:
    """With the tiles of warps that have roles: first, where the busiest processor has the least to do.

    They do a tenth more in the same time: large ones, by two groups in turns where there are several for
    each, and smaller ones where there is one. The smallest is worth its start where it is deep: (1024, 3072)
    to 768 and the norm 13.4 us instead of 13.9, but (1024, 768) to 768 8.2 instead of 7.3 (H100, float16).
    """
    large, turns = roles(128, 128, 64), roles(128, 128, 64, consumers=2)
    several = _tiles(large, M, N) > chip.processors
    given = [turns, large] if several else [large, turns]
    medium, small = roles(128, 128, 16, stages=5), roles(64, 64, 32, stages=8)
    given += [medium, small]
    fitting = [c for c in given if _tiles(c, M, N) <= chip.processors and (c != small or K >= 2048)]
    fitting = fitting or given[:1]
    least = min(fitting, key=lambda config: _work(config, M, N, chip))
    given.remove(least)
    ahead = 0.9 * _work(least, M, N, chip) < min(_work(config, M, N, chip) for config in found)
    return (least, *given, *found) if ahead else (*found, least, *given)


def _work(config: Config, M: int, N: int, chip: Chip) -> int:
    """Sums that the busiest processor makes."""
    tiles_each = -(-_tiles(config, M, N) // chip.processors)
    return tiles_each * config.tiles["BLOCK_M"] * config.tiles["BLOCK_N"]


def _tiles(config: Config, M: int, N: int) -> int:
    return -(-M // config.tiles["BLOCK_M"]) * -(-N // config.tiles["BLOCK_N"])


def _busy(config: Config, M: int, N: int, chip: Chip) -> float:
    """The part of the processors' time that has a tile to work on."""
    count = _tiles(config, M, N)
    return count / (-(-count // chip.processors) * chip.processors)


@functools.lru_cache(maxsize=1024)
def gated_configs(M: int, itemsize: int, chip: Chip) -> tuple[Config, ...]:
    """How two products of the same rows may be cut up, the likeliest first; arguments as above."""
    m = 64 if M > 32 else 32 if M > 16 else 16
    few = ((m, 64, 128, 4, 3), (m, 32, 128, 4, 4), (m, 64, 64, 4, 4))
    many = ((128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))
    small = ((64, 64, 32, 4, 2), (32, 32, 32, 4, 2))
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K"
    found = [
        Config({**dict(zip(names, cut, strict=True)), "GROUP_M": 8}, warps, stages)
        for *cut, warps, stages in (*(few if M <= FEW_ROWS else many), *small)
    ]
    return tuple(config for config in found if _shared(config, itemsize, weights=2) <= chip.shared)


@functools.lru_cache(maxsize=1024)
def grouped_configs(rows: int, experts: int, itemsize: int, chip: Chip) -> tuple[Config, ...]:
    """How two products of each expert's rows may be cut up, the likeliest first.

    Tiles high enough for twice an expert's share come first: a second row tile of an expert has the first
    one's weights from L2, but none costs nothing. Before sm_90, where factors pass through registers, two
    sums of 128x128 leave none for them: ptxas puts 3.7 KB a thread into memory (Triton 3.6, sm_80).

    Args:
        rows: of all experts together.
        experts: that share them.
        itemsize: bytes of an element.
        chip: what the tiles must fit.
    """
    share = -(-rows // max(experts, 1))
    likely, lower = (gated_configs(height, itemsize, chip) for height in (2 * share, share))
    found = *likely, *(config for config in lower if config not in likely)
    return tuple(c for c in found if chip.shared > AMPERES or c.tiles["BLOCK_M"] * c.tiles["BLOCK_N"] < 2**14)


@functools.lru_cache(maxsize=1024)
def loss_configs(
    M: int, N: int, itemsize: int, chip: Chip, tma: bool, whole: bool = True
) -> tuple[Config, ...]:
    """How the logits of a loss may be cut up, the likeliest first; the depth is not, for tiles are many.

    Of many rows the largest tile has the least to read. All row tiles of the same classes go together: a head
    of 128k classes is larger than L2, the rows are not.

    Args:
        M: rows of x.
        N: classes.
        itemsize: bytes of an element.
        chip: what the tiles must fit.
        tma: whether they may be moved by TMA.
        whole: whether threads read 16 bytes at a time; else the addresses of deep tiles leave no registers.
    """
    m = 64 if M > 32 else 32 if M > 16 else 16
    found: tuple[Config, ...]
    by_tma: tuple[Config, ...]
    if M <= 64:
        found = (tiles(m, 128, 64, 4, 5), tiles(m, 128, 128, 4, 3), tiles(m, 64, 128, 4, 4))
        by_tma = (tma_tiles(m, 128, 128, 4, 4, tma=EACH), tma_tiles(m, 128, 64, 4, 4, tma=EACH))
    else:
        found = (
            tiles(128, 256, 64, 8, 3, group=16),
            tiles(128, 128, 64, 8, 3, group=16),
            tiles(64, 128, 64, 4, 4, group=16),
        )
        by_tma = (
            tma_tiles(128, 256, 64, 8, 3, group=16),
            tma_tiles(128, 256, 64, 8, 4, group=16, tma=EACH),
            tma_tiles(128, 128, 64, 4, 3, group=16, tma=EACH),
            tma_tiles(128, 128, 64, 8, 4, group=16),
        )
    if not whole:
        found = (tiles(m, 64, 32, 4, 4) if M <= 64 else tiles(128, 128, 32, 8, 3, group=16),)
    found = (*by_tma, *found) if tma else found
    ordered = sorted(found, key=lambda config: -min(_busy(config, max(M, 1), N, chip), 0.7))
    small = tiles(64, 64, 32, 4, 3), tiles(32, 32, 32, 4, 2)  # enough for every GPU, in float32 too
    return tuple(c for c in (*ordered, *small) if _shared(c, itemsize) <= chip.shared)


def _shared(config: Config, itemsize: int, weights: int = 1, residual: bool = False) -> int:
    """Bytes of shared memory: the tiles under way, and with TMA the finished one.

    That lies beside the next one's factors, or, of a program that has no next one, in its own's place. A
    residual comes to its threads through as much again.
    """
    m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
    under_way = (m + weights * n) * k * itemsize * config.num_stages
    tma = config.tiles.get("TMA")
    if tma == ROLES:
        finished = 2 * m * (n - config.tiles["NARROW"]) if config.tiles["CONSUMERS"] == 2 else m * n
        return under_way + finished * itemsize + 1024
    finished = m * n * itemsize * (1 + residual) if tma and config.tiles["SPLITS"] == 1 else 0
    return (under_way + finished if tma == RESIDENT else max(under_way, finished)) + 1024
