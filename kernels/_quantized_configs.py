"""Tiles for products with a weight in 4 or 8 bits, chosen by shape."""

from __future__ import annotations

import functools

from graphopt.kernels._linear_configs import FEW_ROWS, Chip, parts_of_depth
from graphopt.kernels._tuning import Config, distinct

PIECE = 32  # weights of a block that are multiplied at a time: two steps of the tensor cores
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
    return tuple(config for config in distinct(found) if _shared(config, itemsize) <= chip.shared)


def _few_rows(M: int, N: int, K: int, chip: Chip) -> list[Config]:
    """Deep steps, many on their way: what such a product waits for is its weight.

    Programs of two warps are too small for the products of whole warp groups that sm_90 has. With the older
    ones a thread reads eight bytes of the weight at a time where those take two, and its warps issue 1340
    instructions for a step of 16x64x256 instead of 2640 (float16; counted in machine code, not timed). One
    such program keeps half of a processor's schedulers busy, so twice as many as processors are wanted.
    """
    m = next(size for size in (16, 32, 64, 128) if size >= M or size == 128)

    def parts(n: int, programs: int = 1) -> int:
        return _parts(M, N, K, m, n, chip, programs)

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
    return found if K >= _DEEP else [found[1], found[0], *found[2:]]  # uncut, narrow tiles are more programs


def _parts(M: int, N: int, K: int, m: int, n: int, chip: Chip, programs: int) -> int:
    """Parts of the depth of tiles of m rows and n columns that make so many programs a processor."""
    wanted = Chip(programs * chip.processors, chip.shared)
    return parts_of_depth(-(-M // m) * -(-N // n), K, wanted) if K >= _DEEP else 1


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


def block_tiles(m: int, n: int, pieces: int, warps: int, stages: int, splits: int = 1) -> Config:
    """A configuration of a product with a scale a block of the weight.

    Args:
        m: rows of a tile.
        n: columns of a tile.
        pieces: of the depth in one step, a product each; as many as warps, or more.
        warps: of a program.
        stages: steps whose tiles are on their way at a time.
        splits: parts that the depth is cut into, each summed by a program of its own.
    """
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "PIECES": pieces, "GROUP_M": 8, "SPLITS": splits}
    return Config(sizes, warps, stages)


@functools.lru_cache(maxsize=1024)
def block_configs(
    M: int, N: int, K: int, piece: int, bits: int, itemsize: int, chip: Chip
) -> tuple[Config, ...]:
    """How a product with a scale a block may be cut up, the likeliest first.

    The sums of a step's pieces are held apart to the end, so that tiles are small, of many rows too.

    Args:
        M: rows of x.
        N: rows of the weight.
        K: columns of both.
        piece: weights of a block that are multiplied at a time.
        bits: of a weight.
        itemsize: bytes of an element of x.
        chip: what the tiles must fit.
    """
    m = 16 if M <= 16 else 32

    def parts(n: int) -> int:
        return _parts(M, N, K, m, n, chip, 2)

    found = [
        block_tiles(m, 64, 4, 4, 5, parts(64)),
        block_tiles(m, 32, 4, 4, 6, parts(32)),
        block_tiles(m, 64, 4, 4, 5),
        block_tiles(m, 32, 8, 8, 4, parts(32)),
        block_tiles(m, 32, 4, 4, 6),
    ]
    if M > FEW_ROWS:
        found = [block_tiles(64, 32, 4, 4, 4), block_tiles(64, 32, 8, 8, 3), *found]
    found.append(block_tiles(16, 32, 4, 4, 2))

    def fits(config: Config) -> bool:
        m, n, pieces = (config.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "PIECES"))
        step = pieces * (m * piece * itemsize + n * piece * bits // 8 + n * itemsize)
        return max(step * config.num_stages, pieces * m * n * 4) + 1024 <= chip.shared

    return tuple(filter(fits, distinct(found)))
