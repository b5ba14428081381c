"""The method of every comparison: sides in interleaved rounds, ratios with a bootstrap interval."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping


def interleave(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times in milliseconds, in rounds of A B C, C B A, so that drift hits every side alike."""
    names = list(sides)
    for name in names:
        for _ in range(3):
            sides[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in (*names, *reversed(names)):
            start = time.perf_counter()
            sides[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(peer: list[float], own: list[float], draws: int = 2000) -> dict[str, float]:
    """How many times as long the peer takes: ratio of medians, with a 95% bootstrap interval over rounds."""
    source = random.Random(0)
    pairs = list(zip(peer, own, strict=True))
    ratios = []
    for _ in range(draws):
        drawn = source.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(p for p, _ in drawn) / statistics.median(o for _, o in drawn))
    ratios.sort()
    low, high = ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]
    middle = statistics.median(peer) / statistics.median(own)
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def quartiles(row: list[float]) -> dict[str, float]:
    """The median of times, and the quartiles below and above it."""
    lower, middle, upper = statistics.quantiles(row, n=4)
    return {"median": round(middle, 3), "lower": round(lower, 3), "upper": round(upper, 3)}
