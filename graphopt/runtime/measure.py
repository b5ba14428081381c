"""Timing candidates against each other: interleaved, in one process, with a noise floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphopt.runtime.rounds import event_clock, wall_clock

_WARM_UP = 2
_MIN_ROUNDS, _MAX_ROUNDS = 5, 50
_HOPELESS = 1.5  # times as slow as the best in its warm-up: more rounds would not change the choice


@dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Args:
        median_ms: median time of one call, in milliseconds.
        spread_ms: half the distance between the quartiles, in milliseconds.
        rounds: calls timed.
    """

    median_ms: float
    spread_ms: float
    rounds: int


def interleaved(
    candidates: Sequence[Callable[[], object]], *, seconds: float, device: torch.device
) -> list[Timing]:
    """Time candidates in rounds A B C, C B A, A B C, ..., so that drift hits all of them alike.

    Args:
        candidates: each runs once when called.
        seconds: about how long to spend; at least 5 and at most 50 rounds are run.
        device: whose work to wait for.

    Returns:
        A timing per candidate, in order; one that is hopeless in its warm-up keeps that as its timing.
    """
    times = [[_call(candidate, device) for _ in range(_WARM_UP)] for candidate in candidates]
    best = min(min(row) for row in times)
    order = [index for index, row in enumerate(times) if min(row) <= _HOPELESS * best]
    cost = sum(min(times[index]) for index in order) / 1e3
    rounds = min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(seconds / max(cost, 1e-6))))
    for index in order:
        times[index].clear()
    for _ in range(rounds):
        for index in order:
            times[index].append(_call(candidates[index], device))
        order.reverse()
    return [_timing(row) for row in times]


def _call(candidate: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; on a GPU between two events, so that waiting for it does not count."""
    if device.type != "cuda":
        return wall_clock(candidate)
    with torch.cuda.device(device):
        return event_clock(candidate)


def _timing(row: list[float]) -> Timing:
    lower, _, upper = statistics.quantiles(row, n=4)
    return Timing(statistics.median(row), (upper - lower) / 2, len(row))
