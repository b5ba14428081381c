"""Timing candidates against each other: interleaved, in one process, with a noise floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphopt.runtime.rounds import Clock, clock_of, interleave

_WARM_UP, _MORE = 2, 6  # calls of each; in all of one that looks hopeless
_MORE_MS = 1e3  # in all, for these
_MAX_ROUNDS = 25  # each of two calls of a candidate
_SHORT = 1.0  # seconds that are enough for calls which are quick
HOPELESS = 1.5  # times as slow as the best in its warm-up: more rounds would not change the choice


@dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Args:
        lower_ms: lower quartile of a call's time, in milliseconds: about what it takes undisturbed, as what
            is busy beside a call only ever makes it longer.
        median_ms: the median.
        upper_ms: the upper quartile.
        rounds: calls timed.
    """

    lower_ms: float
    median_ms: float
    upper_ms: float
    rounds: int

    @staticmethod
    def of(times: Sequence[float]) -> Timing:
        """What calls took, two or more, in milliseconds."""
        lower, middle, upper = statistics.quantiles(times, n=4)
        return Timing(lower, middle, upper, len(times))

    @property
    def spread_ms(self) -> float:
        """Half the distance between the quartiles, in milliseconds."""
        return (self.upper_ms - self.lower_ms) / 2

    def times(self, factor: float) -> Timing:
        """The same on a machine so many times as slow."""
        return Timing(self.lower_ms * factor, self.median_ms * factor, self.upper_ms * factor, self.rounds)


def interleaved(
    candidates: Sequence[Callable[[], object]], *, seconds: float, device: torch.device
) -> list[Timing]:
    """Time candidates in rounds A B C, C B A, A B C, ..., so that drift hits all of them alike.

    Args:
        candidates: each runs once when called.
        seconds: about how long to spend; at least 6 and at most 50 calls of each are timed.
        device: whose work to wait for.

    Returns:
        A timing per candidate, in order; one that is hopeless in its warm-up keeps that as its timing.
    """
    if device.type != "cuda":
        return _interleaved(candidates, seconds, clock_of(device))
    with torch.cuda.device(device):
        return _interleaved(candidates, seconds, clock_of(device))


def _interleaved(candidates: Sequence[Callable[[], object]], seconds: float, clock: Clock) -> list[Timing]:
    names = list(map(str, range(len(candidates))))
    sides = dict(zip(names, candidates, strict=True))
    times = {name: [clock(sides[name]) for _ in range(_WARM_UP)] for name in names}
    best = min(map(min, times.values()))
    for name in names:
        _try_again(times[name], sides[name], best, clock)
    hopeful = {name: sides[name] for name in names if min(times[name]) <= HOPELESS * best}
    round_s = 4 * sum(min(times[name]) for name in hopeful) / 1e3  # settling left out
    seconds = min(seconds, max(_SHORT, _MAX_ROUNDS * round_s))  # quick calls are judged by fewer rounds
    times |= interleave(hopeful, _MAX_ROUNDS, seconds=seconds, clock=clock, warm_up=0)
    return [Timing.of(times[name]) for name in names]


def warmed_up(candidate: Callable[[], object], best_ms: float, device: torch.device) -> Timing:
    """What a candidate's first calls take, the quickest: enough to see that it is hopeless.

    Args:
        candidate: runs once when called.
        best_ms: what the best of the others takes.
        device: whose work to wait for.
    """
    clock = clock_of(device)
    times = [clock(candidate) for _ in range(_WARM_UP)]
    _try_again(times, candidate, best_ms, clock)
    took = min(times)
    return Timing(took, took, took, len(times))


def _try_again(times: list[float], candidate: Callable[[], object], best_ms: float, clock: Clock) -> None:
    """More calls while all looks hopeless: first ones allocate, and what is busy beside them delays some."""
    while min(times) > HOPELESS * best_ms and len(times) < _MORE and sum(times) < _MORE_MS:
        times.append(clock(candidate))
