"""Tiles for products of float8 rows, chosen by shape."""

from __future__ import annotations

import functools

from graphopt.kernels._linear_configs import EACH, FEW_ROWS, RESIDENT, Chip
from graphopt.kernels._tuning import Config


def float8_tiles(m: int, n: int, k: int, warps: int, stages: int, tma: int = 0, group: int = 8) -> Config:
    """A configuration of a float8 product.

    Args:
        m: rows of a tile.
        n: columns of a tile.
        k: depth of one step, and products that are added before float32 takes over.
        warps: of a program.
        stages: steps whose tiles are on their way at a time.
        tma: RESIDENT or EACH for the kernel that moves tiles by TMA, 0 for the other.
        group: row tiles that are walked through before the next column tile.
    """
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "TMA": tma}
    return Config(sizes, warps, stages)


@functools.lru_cache(maxsize=1024)
def float8_configs(M: int, N: int, itemsize: int, chip: Chip, tma: bool) -> tuple[Config, ...]:
    """How a product may be cut up, the likeliest first.

    A tile's sums are held twice, in the tensor cores' accumulators and in float32, and 128x256 of them are
    more than eight warps have registers for.

    Args:
        M: rows of x.
        N: rows of the weight.
        itemsize: bytes of an element of the result.
        chip: what the tiles must fit.
        tma: whether they may be moved by TMA.
    """
    found = _few_rows(M, tma) if M <= FEW_ROWS else _many_rows(M, N, chip, tma)
    found += (float8_tiles(64, 64, 64, 4, 3), float8_tiles(32, 32, 32, 4, 2))  # small enough for every GPU
    return tuple(config for config in found if _shared(config, itemsize) <= chip.shared)


def _few_rows(M: int, tma: bool) -> tuple[Config, ...]:
    """Deep steps, many on their way: what such a product waits for is its weights."""
    m = 64 if M > 32 else 32 if M > 16 else 16
    by_pointer = (
        float8_tiles(m, 64, 128, 4, 5),
        float8_tiles(m, 32, 256, 4, 4),
        float8_tiles(m, 128, 128, 4, 4),
    )
    if not tma:
        return by_pointer
    by_tma = (
        float8_tiles(64, 64, 128, 4, 6, EACH),
        float8_tiles(64, 32, 256, 4, 5, EACH),
        float8_tiles(64, 128, 128, 4, 5, EACH),
        float8_tiles(128, 64, 128, 8, 5, EACH),
    )
    return by_tma + by_pointer[:2]


def _many_rows(M: int, N: int, chip: Chip, tma: bool) -> tuple[Config, ...]:
    """The larger of two tiles where it fills the processors, else the smaller; then the others."""
    if not tma:
        return (
            float8_tiles(128, 128, 64, 8, 4),
            float8_tiles(64, 128, 128, 4, 3),
            float8_tiles(64, 64, 128, 4, 4),
        )
    large, small = float8_tiles(128, 128, 128, 8, 5, RESIDENT), float8_tiles(64, 128, 128, 4, 5, RESIDENT)
    filled = chip.processors <= -(-M // 128) * -(-N // 128)
    first = (large, small) if filled else (small, large)
    return (
        *first,
        float8_tiles(128, 128, 128, 8, 4, EACH),
        float8_tiles(64, 128, 128, 4, 4, EACH),
        float8_tiles(64, 256, 128, 8, 4, RESIDENT),
        float8_tiles(128, 64, 128, 4, 5, RESIDENT),
    )


def _shared(config: Config, itemsize: int) -> int:
    """Bytes of shared memory: the tiles under way, and with TMA the finished one."""
    m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
    return (m + n) * k * config.num_stages + (m * n * itemsize if config.tiles["TMA"] else 0) + 1024
