"""Tiles for matrix products, chosen by shape."""

from __future__ import annotations

from graphopt.kernels._tuning import Config


def tiles(
    m: int, n: int, k: int, warps: int, stages: int, splits: int = 1, group: int = 8
) -> Config:
    """A configuration of ``_linear_kernel``.

    Args:
        m: rows of a tile.
        n: columns of a tile.
        k: depth of one step.
        warps: of a program.
        stages: steps whose tiles are on their way at a time.
        splits: parts that the depth is cut into, each summed by a program of its own.
        group: row tiles that are walked through before the next column tile, so that they share weights in L2.
    """
    cut = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "SPLITS": splits, "TMA": 0}
    return Config(cut, warps, stages)


def tma_tiles(
    m: int, n: int, k: int, warps: int, stages: int, splits: int = 1, group: int = 8, tma: int = 1, halves: int = 1
) -> Config:
    """A configuration of ``_linear_tma_kernel``.

    Args:
        m: rows of a tile.
        n: columns of a tile.
        k: depth of one step.
        warps: of a program.
        stages: steps whose tiles are on their way at a time.
        splits: parts that the depth is cut into.
        group: row tiles that are walked through before the next column tile, so that they share weights in L2.
        tma: RESIDENT or EACH.
        halves: parts that a tile is finished and stored in, to save registers and shared memory.
    """
    cut = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "SPLITS": splits}
    return Config({**cut, "TMA": tma, "HALVES": halves}, warps, stages)
