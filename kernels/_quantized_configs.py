"""Tiles for products with a weight in 8 bits, chosen by shape."""

from __future__ import annotations

import functools

from graphopt.kernels._linear_configs import FEW_ROWS, Chip, parts_of_depth
from graphopt.kernels._tuning import Config

_DEEP = 2048  # from which on cutting the depth gains more than the kernel that adds up the parts takes


def quantized_tiles(
    m: int, n: int, k: int, warps: int, stages: int, splits: int = 1, group: int = 8
) -> Config:
    """A configuration of a product with a weight in 8 bits.

    Args:
        m: rows of a tile.
        n: columns of a tile.
        k: depth of one step.
        warps: of a program.
        stages: steps whose tiles are on their way at a time.
        splits: parts that the depth is cut into, each summed by a program of its own.
        group: row tiles that are walked through before the next column tile.
    """
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "SPLITS": splits}
    return Config(sizes, warps, stages)


@functools.lru_cache(maxsize=1024)
def quantized_configs(M: int, N: int, K: int, itemsize: int, chip: Chip) -> tuple[Config, ...]:
    """How a product may be cut up, the likeliest first.

    Args:
        M: rows of x.
        N: rows of the weight.
        K: columns of both.
        itemsize: bytes of an element of x.
        chip: what the tiles must fit.
    """
    found = _few_rows(M, N, K, chip) if M <= FEW_ROWS else _many_rows(M, N, chip)
    found += [quantized_tiles(64, 64, 32, 4, 3), quantized_tiles(32, 32, 32, 4, 2)]  # for every GPU
    found = [config for place, config in enumerate(found) if config not in found[:place]]
    return tuple(config for config in found if _shared(config, itemsize) <= chip.shared)


def _few_rows(M: int, N: int, K: int, chip: Chip) -> list[Config]:
    """Deep steps, many on their way: what such a product waits for is its weight.

    Programs of two warps are too small for the products of whole warp groups that sm_90 has. With the older
    ones a thread reads eight bytes of the weight at a time where those take two, and its warps issue 1340
    instructions for a step of 16x64x256 instead of 2640 (float16; counted in machine code, not timed). One
    such program keeps half of a processor's schedulers busy, so twice as many as processors are wanted.
    """
    m = next(size for size in (16, 32, 64, 128) if size >= M or size == 128)
    tall, deep = -(-M // m), K >= _DEEP

    def parts(n: int, programs: int = 1) -> int:
        fewer = Chip(programs * chip.processors, chip.shared)
        return parts_of_depth(tall * -(-N // n), K, fewer) if deep else 1

    if m > 32:
        return [
            quantized_tiles(m, 64, 128, 4, 4, parts(64)),
            quantized_tiles(m, 64, 128, 4, 4),
            quantized_tiles(m, 64, 64, 4, 6, parts(64)),
            quantized_tiles(m, 128, 64, 8, 4, parts(128)),
            quantized_tiles(64, 64, 128, 4, 5, parts(64)),
        ]
    found = [
        quantized_tiles(m, 64, 256, 2, 4, parts(64, 2)),
        quantized_tiles(m, 32, 256, 4, 4, parts(32)),
        quantized_tiles(m, 32, 256, 2, 4),
        quantized_tiles(m, 64, 128, 2, 6, parts(64, 2)),
        quantized_tiles(m, 64, 256, 4, 4, parts(64)),
    ]
    return found if deep else [found[1], found[0], *found[2:]]  # uncut, narrow tiles are more programs


def _many_rows(M: int, N: int, chip: Chip) -> list[Config]:
    """256 rows where they fill the processors: widening a step takes as long for them as for 128."""
    tall = quantized_tiles(256, 128, 64, 8, 3)
    found = [
        quantized_tiles(128, 128, 64, 8, 4),
        quantized_tiles(128, 64, 64, 4, 4),
        quantized_tiles(64, 128, 64, 4, 4),
    ]
    filled = chip.processors <= -(-M // 256) * -(-N // 128)
    return [tall, *found] if filled else [*found, tall]


def _shared(config: Config, itemsize: int) -> int:
    """Bytes of shared memory: the tiles under way, a byte a weight, or the sums turned over."""
    m, n, k = (config.tiles[f"BLOCK_{letter}"] for letter in "MNK")
    return max((m * itemsize + n) * k * config.num_stages, m * n * 4) + 1024
