"""Tiles for matrix products, chosen by shape."""

from __future__ import annotations

import functools

from graphopt.kernels._tuning import Config

FEW_ROWS = 256  # up to which a product waits for its weights more than for anything else
RESIDENT, EACH = 1, 2  # with TMA: a program goes on from tile to tile, or each tile has its own


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
    tma: int = 1,
    extra: int = 0,
) -> Config:
    """A configuration of ``_linear_tma_kernel``.

    Args:
        m: rows of a tile.
        n: columns of a tile.
        k: depth of one step.
        warps: of a program.
        stages: steps whose tiles are on their way at a time.
        splits: parts that the depth is cut into.
        group: row tiles that are walked through before the next column tile: they share its weights in L2.
        tma: RESIDENT or EACH.
        extra: further columns of a tile, with sums of their own; for tiles of 192, which no block can have.
    """
    cut = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "SPLITS": splits}
    return Config({**cut, "TMA": tma, "EXTRA_N": extra}, warps, stages)


@functools.lru_cache(maxsize=1024)
def linear_configs(
    M: int, N: int, K: int, itemsize: int, processors: int, tma: bool, then_summed: bool
) -> tuple[Config, ...]:
    """How a product may be cut up, the likeliest first.

    Args:
        M: rows of x.
        N: rows of the weight.
        K: columns of both.
        itemsize: bytes of an element.
        processors: of the GPU.
        tma: whether tiles may be moved by TMA.
        then_summed: whether a kernel follows that adds up partial sums at no cost.
    """
    return (tiles(64, 64, 64, 4, 4),)


@functools.lru_cache(maxsize=1024)
def gated_configs(M: int, N: int, K: int, processors: int) -> tuple[Config, ...]:
    """How two products of the same rows may be cut up, the likeliest first; arguments as above."""
    sizes = (
        (64, 64, 64, 4, 4),
        (128, 128, 64, 8, 3),
        (64, 64, 128, 4, 3),
        (64, 128, 64, 4, 4),
        (64, 32, 128, 4, 4),
    )
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K"
    return tuple(
        Config({**dict(zip(names, cut, strict=True)), "GROUP_M": 8}, warps, stages)
        for *cut, warps, stages in sizes
    )
