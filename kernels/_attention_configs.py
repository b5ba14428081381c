"""How attention is cut up, chosen by shape."""

from __future__ import annotations

import functools

from graphopt.kernels._rows import power_of_two
from graphopt.kernels._tuning import Config


@functools.lru_cache(maxsize=1024)
def blocks(
    heads: int, S: int, T: int, width: int, itemsize: int, processors: int, shared: int
) -> tuple[Config, ...]:
    """How attention may be cut up, the likeliest first.

    12 heads of 64 features, float16, in CUDA graphs on an H100: 1 x 128 tokens 3.0 us, flash attention 5.2;
    8 x 128 4.1 us, flash 6.0, and with a mask of keys 4.5 us, cuDNN 13.1; 32 x 128 12.3 us, cuDNN 13.5; 197
    tokens 4.6 us, cuDNN 7.6; 64 x 197 45.7 us, cuDNN 47.1; 32 x 512 80.5 us, cuDNN 70.3, with a mask that
    allows 62 % of the keys 85.4 us (were all looked at, 101.6), and without their padding (lengths from 16 to
    512) 45.3 us, flash 63.2.

    Args:
        heads: of all sequences together.
        S: queries of a sequence.
        T: keys of a sequence.
        width: features of a head.
        itemsize: bytes of an element.
        processors: of the GPU.
        shared: bytes of shared memory that a program may have.
    """
    if S <= 16:
        found = [_blocks(16, 64, 2, 2), _blocks(16, 128, 4, 2), _blocks(16, 32, 1, 3)]
    else:
        found = [
            _blocks(64, 64, 4, 3),
            _blocks(64, 128, 4, 1),
            _blocks(64, 32, 4, 3),
            _blocks(128, 32, 4, 3),
            _blocks(64, 64, 4, 2),
            _blocks(128, 64, 8, 3),
            _blocks(32, 128, 4, 1),
        ]
        programs = -(-S // 64) * heads
        if T <= 128:
            likely = 0 if programs <= processors else 1 if programs <= 4 * processors else 3
        else:
            likely = 2 if T <= 256 else 0
        found.insert(0, found.pop(likely))
    found += [_blocks(32, 32, 4, 2), _blocks(16, 16, 1, 1)]  # small enough for every GPU
    return tuple(config for config in found if _shared(config, width, itemsize) <= shared)


def _blocks(s: int, t: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_S": s, "BLOCK_T": t}, warps, stages)


def _shared(config: Config, width: int, itemsize: int) -> int:
    """Bytes of shared memory: the queries, the keys and values on their way, and the weights of a step."""
    s, t = config.tiles["BLOCK_S"], config.tiles["BLOCK_T"]
    kept = s * power_of_two(width) + 2 * t * power_of_two(width) * config.num_stages + s * t
    return kept * itemsize + 1024


def tail(T: int, block: int, is_causal: bool) -> int:
    """Keys of the step at the edge: 16 for the last 5 of 197, not a whole block of 64.

    A causal edge lies elsewhere for every block of queries.
    """
    left = T % block
    return block if is_causal or left == 0 else max(16, power_of_two(left))


def padded(D: int, E: int) -> dict[str, int]:
    """Features as blocks: powers of two, and no fewer than the tensor cores take."""
    return {"BLOCK_D": max(16, power_of_two(D)), "BLOCK_E": max(16, power_of_two(E))}
