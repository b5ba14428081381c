"""The method of every comparison: interleaved rounds, ratios with a bootstrap interval, a noise floor."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from graphopt.compiler.device import l2_bytes

Run = Callable[[], object]
Clock = Callable[[Run], float]
Verdict = Literal["faster", "level", "slower"]

_WARM_UP = 3
_SETTLING_MS, _SETTLING_CALLS = 15.0, 5000
_LONG_MS = 500.0
_MIN_ROUNDS = 3  # however little time is given: below, there are no quartiles to speak of


class Interrupted(KeyboardInterrupt):
    """Somebody pressed Ctrl-C between the first round and the last.

    Args:
        times: of the rounds that were complete by then, in milliseconds by side.
    """

    def __init__(self, times: dict[str, list[float]]) -> None:
        super().__init__("interrupted")
        self.times = times


def interleave(
    sides: Mapping[str, Run],
    rounds: int,
    *,
    seconds: float | None = None,
    clock: Clock | None = None,
    on_round: Callable[[float], None] | None = None,
    warm_up: int = _WARM_UP,
) -> dict[str, list[float]]:
    """Times in milliseconds, in rounds of A B C, C B A, so that drift hits every side alike.

    Args:
        sides: each runs once when called.
        rounds: at most so many; each runs every side once forwards and once backwards.
        seconds: begin no round after so many, the first three excepted; None for all rounds.
        clock: runs a side and tells its time; by default the wall's.
        on_round: called after every round with the fraction of the rounds, or of the time, that is done.
        warm_up: calls of every side before the first round.

    Returns:
        Two times a round and side, in order.

    Raises:
        Interrupted: on Ctrl-C, with the complete rounds.
    """
    clock = clock or wall_clock
    names = list(sides)
    for name in names:
        for _ in range(warm_up):
            clock(sides[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    start, done = time.perf_counter(), 0
    try:
        while done < rounds:
            spent = 0.0 if seconds is None else (time.perf_counter() - start) / max(seconds, 1e-9)
            if spent >= 1 and done >= _MIN_ROUNDS:
                break
            row = [(name, clock(sides[name])) for name in (*names, *reversed(names))]
            for name, took in row:
                times[name].append(took)
            done += 1
            if on_round is not None:
                on_round(min(1.0, max(done / rounds, spent)))
    except KeyboardInterrupt:
        raise Interrupted({name: row[: 2 * done] for name, row in times.items()}) from None
    return times


# Clocks


def wall_clock(run: Run) -> float:
    """The time of one call in milliseconds, on the wall; for work that ends when the call does."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def event_clock(run: Run) -> float:
    """The time of one call in milliseconds between two events on the current GPU's current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _settled_clock(run: Run) -> float:
    took = spent = wall_clock(run)
    if took >= _LONG_MS:
        return took
    for _ in range(_SETTLING_CALLS):
        if spent >= _SETTLING_MS:
            break
        spent += wall_clock(run)
    return wall_clock(run)


def clock_of(device: torch.device, *, cold: bool = False) -> Clock:
    """The clock for work on a device.

    Args:
        device: where the sides run.
        cold: drive their data out of the L2 cache before every call; on a GPU only.

    Returns:
        A clock that runs a side before the call that it times, so that every side finds caches and thread
        pools as its own calls leave them, whoever ran before. On a CPU it is the wall's, and a side runs for
        15 ms before: threads of OpenMP spin for 5 to 14 ms after the call that they were needed for, which
        made a call of 2.8 ms that came next 4.2 ms long. A call of half a second is timed by itself. On a GPU
        a side runs once before, and the clock is one of events around the call, on the current stream: from
        an idle device to the last kernel's end, launches included. With a cold L2 the launches overlap with
        the kernel that empties it, so that what is measured is closer to the kernels alone.
    """
    if device.type != "cuda":
        return _settled_clock
    flush = None
    if cold:
        flush = torch.empty(4 * l2_bytes(device), dtype=torch.int8, device=device)

    def clock(run: Run) -> float:
        run()
        torch.cuda.synchronize(device)
        if flush is not None:
            flush.zero_()
        return event_clock(run)

    return clock


# Verdicts


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


def noise_floor(again: Mapping[str, float]) -> float:
    """What a side differs from itself by: the far end of the interval of its A/A ratio, as a fraction."""
    return max(1 / again["low"], again["high"]) - 1


def verdict(found: Mapping[str, float], floor: float) -> Verdict:
    """What a ratio of a peer to graphopt lets one say of graphopt.

    Args:
        found: what ``ratio`` returns.
        floor: the noise floor, as a fraction.

    Returns:
        ``faster`` or ``slower`` only where the whole interval lies on that side of 1, and the ratio beyond
        the noise floor; ``level`` otherwise.
    """
    if found["low"] > 1 and found["ratio"] > 1 + floor:
        return "faster"
    if found["high"] < 1 and found["ratio"] < 1 / (1 + floor):
        return "slower"
    return "level"


def quartiles(row: list[float]) -> dict[str, float]:
    """The median of times, and the quartiles below and above it, to four digits."""
    lower, middle, upper = (float(f"{value:.4g}") for value in statistics.quantiles(row, n=4))
    return {"median": middle, "lower": lower, "upper": upper}
