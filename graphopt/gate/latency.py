"""Speed as a ratio to something else in the same run, and when that is enough to say no.

What is asked: is the candidate's time, divided by another side's, above a limit? The answer must not be "yes"
because the machine was busy, and must be "yes" when the candidate became a tenth slower. How that is held:

- **Two things to compare with.** The baseline, eager PyTorch by default, says what graphopt is good for. But
  a machine of which others take a share does not slow two ways of running alike: on a virtual machine of two
  cores eager took 35 % longer for minutes at a time, and ONNX Runtime 25 %. So a lock is held against the
  *control* besides: the graph as it was captured, on the executors that run the candidate. Over an hour of
  such minutes the ratio to eager varied by 2.5 to 3.5 %, that to the control by 1.2 %. What slows the
  executor as a whole slows the control, too; it is found by the ratio to the baseline, with a wider margin.
- **Interleaved rounds.** A round is baseline, candidate, control, and back (``runtime/rounds.py``): a
  drift of the clock, of the temperature or of the load hits all sides alike. The clock is the device's,
  CUDA events on a GPU, and runs a side once before the call that it times: what the other side left in
  caches and thread pools is not in the number.
- **Neighbours.** What other processes and a virtual machine's host take away comes and goes within a second,
  and mostly slows all sides; what interrupts a single call only ever adds to its time. So a round's ratio is
  that of the faster of its two calls of either side, and the estimate is the interquartile mean of the
  rounds' logarithms. Of the estimators that were tried on recorded rounds of three days it varied least from
  check to check on most: that of medians varied twice as much, and that of the 15th percentiles as much on
  one day and twice as much on another. (The minimum of all calls, as in Chen and Revels, Robust benchmarking
  in noisy environments, arXiv:1608.04295, compares two moments in which the machine need not have been the
  same.)
- **A block bootstrap.** Neighbouring rounds are alike (load comes and goes in bursts), so drawing single
  rounds anew, as if they were independent, gives intervals that are too narrow just when the machine is
  busy. Whole blocks of neighbours are drawn, on a circle, so that every round is drawn as often (Politis and
  Romano, 1992). A block is 2 n^(1/3) rounds long, of n: the order that is optimal for the variance (Künsch,
  1989; Hall, Horowitz and Jing, 1995), doubled, because too long a block errs on the side of wide intervals.
  What varies between draws is known from as many values as there are blocks, so the interval is Student's.
- **As many rounds as it takes.** Rounds go on until every limit lies outside of the interval, or the time is
  out. To look several times is to have several chances to be wrong, so the 5 % of all looks together are
  spent on them: little on the early ones, and what is left on the last (Lan and DeMets, 1983).
- **A lock of several processes.** The same program in another process runs up to two percent faster or
  slower: memory lies elsewhere, threads land on other cores. No number of rounds in one process averages
  that out, so a lock's ratio is the median of those of several processes (``combined``), and a check's is
  held against it plus the margin ``max_slowdown``, 4 % by default: more than processes differ by, and less
  than half of a slow-down by 10 %.
- **No verdict from a machine that is not comparable.** Two thread pools that spin differently lose
  differently to a third process. Rounds cannot show that, since it is the same in all of them. So a limit
  counts as broken only where this process's threads hardly waited for a core (Linux tells that of each
  thread) and the baseline itself takes about the time that it took for the lock: a quarter more at most for
  the ratio to it, twice as much for that to the control, which is of like with like. Otherwise the finding is
  ``inconclusive``, which has an exit code of its own, and says which of the two it was. A limit that is kept,
  is kept on a busy machine as well.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from graphopt.runtime.rounds import Clock, Run, clock_of, interleave

Told = Literal["within", "beyond", "unknown"]

BASELINE, CANDIDATE, CONTROL = "baseline", "candidate", "control"
Limit = tuple[str, float]  # of the ratio of the candidate's time to that of a side
_FIRST = 32  # rounds between two looks at the clock,
_FEWEST = 6  # and for a model of which 32 rounds take too long; fewer do not say how wide an interval is
_LOOKS = {64: 0.005, 128: 0.015, 256: 0.03}  # numbers of rounds, and the error that is spent on each look
_DRAWS = 1000
_NARROW = 0.03  # an interval of that half-width is told as "within" by its middle: see ``tell``
# The part of the time that the threads could have run and had no core: above _WAITING somebody else has the
# cores, and so above _MORE_WAITING more than for the lock, whose own threads may be more than the cores;
# but above _MOST_WAITING in any case: beside one other process on every core it is a half.
_WAITING, _MORE_WAITING, _MOST_WAITING = 0.25, 0.10, 0.40
# How long the baseline may take against its own time in the lock, by the side that a limit is of.
_SLOWER = {BASELINE: 1.25, CONTROL: 2.0}
_ROUND_MS = 1.0  # a round is at least so long: a clock's own cost and its grain are then below 0.1 %


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        middle: the estimate.
        low: the lower end.
        high: the upper end.
    """

    middle: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width, relative to its middle."""
        return (self.high - self.low) / (2 * self.middle) if self.middle else math.inf

    def tell(self, limit: float) -> Told:
        """On which side of a limit it lies, as a whole.

        An interval that holds the limit tells nothing, but for one that is narrow and whose middle is not
        above it: more rounds would not make a better answer of "at the limit".
        """
        if self.low > limit:
            return "beyond"
        if self.high <= limit or (self.middle <= limit and self.half_width <= _NARROW):
            return "within"
        return "unknown"

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Rounds:
    """What was timed.

    Args:
        times: milliseconds by side, two a round, in order.
        waiting: which part of the time this process's threads waited for a core; None where that is not
            known.
    """

    times: Mapping[str, Sequence[float]]
    waiting: float | None = None

    @property
    def count(self) -> int:
        """How many rounds there are."""
        return len(self.times.get(CANDIDATE, ())) // 2

    def ratio(self, error: float | None = None, to: str = BASELINE) -> Interval:
        """The candidate's time over that of another side.

        Args:
            error: how often the interval may be wrong; by default what the looks at fewer rounds have left.
            to: the other side.
        """
        logs = _fastest(self.times[CANDIDATE]) - _fastest(self.times[to])
        return _interval(logs, self._unspent() if error is None else error)

    def milliseconds(self, side: str) -> Interval:
        """The time of a call of a side."""
        return _interval(_fastest(self.times[side]), self._unspent())

    def _unspent(self) -> float:
        return sum(error for rounds, error in _LOOKS.items() if rounds >= min(self.count, max(_LOOKS)))


_Array = np.ndarray[Any, Any]


def _fastest(times: Sequence[float]) -> _Array:
    """The logarithm of the faster call of each round, (rounds,)."""
    fastest: _Array = np.log(np.asarray(times, dtype=np.float64).reshape(-1, 2).min(1))
    return fastest


def _middle(values: _Array) -> _Array:
    """The interquartile mean along the last dimension: a quarter is left out at either end."""
    outside = values.shape[-1] // 4
    found: _Array = np.sort(values, -1)[..., outside : values.shape[-1] - outside].mean(-1)
    return found


def _interval(logs: _Array, error: float) -> Interval:
    """The middle of rounds' logarithms, and its interval (see the head of this file).

    Args:
        logs: (rounds,).
        error: how often the interval may miss.
    """
    count = len(logs)
    block = min(count, max(1, math.ceil(2 * count ** (1 / 3))))
    source = np.random.default_rng(0)
    starts = source.integers(count, size=(_DRAWS, math.ceil(count / block)))
    drawn = (starts[:, :, None] + np.arange(block)).reshape(_DRAWS, -1)[:, :count] % count
    inflated = math.sqrt(count / max(1, count - block))  # drawn blocks vary less than blocks to come
    half = _student(1 - error / 2, max(1.0, count / block - 1)) * inflated * _middle(logs[drawn]).std()
    middle = float(_middle(logs))
    return Interval(*(math.exp(log) for log in (middle, middle - half, middle + half)))


def _student(probability: float, freedom: float) -> float:
    """A quantile of Student's t distribution (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def measure(
    sides: Mapping[str, Run],
    limits: Sequence[Limit],
    seconds: float,
    *,
    clock: Clock | None = None,
    precision: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> Rounds:
    """Time sides against each other until it can be told on which side of every limit a ratio lies.

    Args:
        sides: baseline, candidate, and the control where there is one; each runs once when called.
        limits: of the candidate's ratios.
        seconds: begin no more rounds after so many.
        clock: that of the device, by default the CPU's (``rounds.clock_of``): it runs a side once before the
            call that it times.
        precision: go on until the half-width of the ratio to the control, or else to the baseline, is below
            this as well; for a ratio that others will be held against, rather than a limit.
        progress: called with the fraction of the time that is spent.
    """
    clock = clock or clock_of(torch.device("cpu"))
    times: dict[str, list[float]] = {side: [] for side in sides}
    repeats, chunk = _plan(sides, seconds, clock)
    often = {side: _repeated(run, repeats) for side, run in sides.items()}
    watch, start = _Waiting(), time.perf_counter()
    for rounds, error in _LOOKS.items():
        while len(times[CANDIDATE]) < 2 * rounds:
            for side, row in interleave(often, chunk, clock=clock).items():
                times[side] += [each / repeats for each in row]
            spent = (time.perf_counter() - start) / max(seconds, 1e-9)
            if progress is not None:
                progress(min(1.0, spent))
            if spent >= 1:
                return Rounds(times, watch.share())
        found = Rounds(times)
        told = all(found.ratio(error, side).tell(limit) != "unknown" for side, limit in limits)
        if told and (not precision or found.ratio(error, held_against(times)).half_width <= precision):
            break
    return Rounds(times, watch.share())


def held_against(sides: Mapping[str, Any]) -> str:
    """The side whose ratio is compared with that of a lock."""
    return CONTROL if CONTROL in sides else BASELINE


def _plan(sides: Mapping[str, Run], seconds: float, clock: Clock) -> tuple[int, int]:
    """Calls of a side within one timing, and rounds between two looks at the clock.

    Several calls, so that even a model of microseconds can be timed; fewer rounds, so that one of seconds
    does not take minutes. On a GPU the calls of a timing are launched one after the other, without a wait.
    """
    warm = interleave(sides, 3, clock=clock)
    best = [min(row) for row in warm.values()]
    repeats = max(1, math.ceil(_ROUND_MS / max(min(best), 1e-6)))
    a_round = 4 * sum(best) * repeats / 1e3  # two timings of each side, and an untimed one before each
    return repeats, max(_FEWEST, min(_FIRST, int(seconds / max(a_round, 1e-9))))


def _repeated(run: Run, repeats: int) -> Run:
    if repeats == 1:
        return run

    def often() -> None:
        for _ in range(repeats):
            run()

    return often


class _Waiting:
    """How long the threads of this process were ready to run and had no core, from Linux's scheduler."""

    def __init__(self) -> None:
        self._start, self._times = time.perf_counter(), self._read()

    def share(self) -> float | None:
        """The part of the time that threads could have run and had to wait; None where that is not known."""
        if self._times is None:
            return None
        ran, waited = 0.0, 0.0
        for thread, (cpu, wait) in (self._read() or {}).items():
            before = self._times.get(thread, (0, 0))
            ran, waited = ran + cpu - before[0], waited + wait - before[1]
        return round(waited / (ran + waited), 4) if ran + waited > 0 else None

    @staticmethod
    def _read() -> dict[str, tuple[int, int]] | None:
        """By thread: nanoseconds on a core, and nanoseconds ready without one."""
        found = {}
        for path in Path("/proc/self/task").glob("*/schedstat"):
            try:
                cpu, wait, _ = path.read_text().split()
            except (OSError, ValueError):
                continue
            found[path.parent.name] = int(cpu), int(wait)
        return found or None


def not_comparable(rounds: Rounds, locked: Mapping[str, Any] | None, side: str = BASELINE) -> str:
    """Why a limit that seems broken proves nothing on this machine now; "" when it does.

    Args:
        rounds: what was timed.
        locked: ``latency`` of the lock, when it was written on a machine like this one.
        side: that the ratio is to.
    """
    before = locked.get("waiting") if locked else None
    most = min(_MOST_WAITING, max(_WAITING, (before or 0.0) + _MORE_WAITING))
    if rounds.waiting is not None and rounds.waiting > most:
        words = f"its threads waited for a core {rounds.waiting:.0%} of the time"
        return f"{words}: other processes have the machine"
    if locked:
        slower = rounds.milliseconds(BASELINE).middle / locked["baseline_ms"]
        if slower > _SLOWER[side]:
            words = f"the baseline itself takes {slower:.2f} times as long as for the lock"
            return f"{words}: the machine is busy or throttled"
    return ""


def noise(locked: Mapping[str, Any]) -> str:
    """What keeps the ratio of a lock from being a good one to hold others against; "" when nothing does."""
    if (locked["waiting"] or 0.0) > _WAITING:
        return f"the threads waited for a core {locked['waiting']:.0%} of the time: the machine is busy"
    ratio = locked_ratio(locked, held_against(locked))
    width = (ratio["high"] - ratio["low"]) / (2 * ratio["ratio"])
    return f"the ratio is known to {width:.1%} only" if width > 2 * _NARROW else ""


def locked_ratio(locked: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    """``ratio``, ``low`` and ``high`` of a lock's ratio to a side."""
    found: Mapping[str, Any] = locked[CONTROL] if side == CONTROL else locked
    return found


def facts(rounds: Rounds, baseline: str) -> dict[str, Any]:
    """What the lock keeps of the rounds; ``control`` is missing where there was none."""
    control = {CONTROL: _kept(rounds.ratio(to=CONTROL))} if CONTROL in rounds.times else {}
    return {
        "baseline": baseline,
        **_kept(rounds.ratio()),
        **control,
        "baseline_ms": float(f"{rounds.milliseconds(BASELINE).middle:.4g}"),
        "candidate_ms": float(f"{rounds.milliseconds(CANDIDATE).middle:.4g}"),
        "rounds": rounds.count,
        "waiting": rounds.waiting,
    }


def _kept(ratio: Interval) -> dict[str, float]:
    return {"ratio": round(ratio.middle, 4), "low": round(ratio.low, 4), "high": round(ratio.high, 4)}


def combined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the lock keeps of several processes' rounds: their medians, and the hulls of their intervals."""
    waiting = [row["waiting"] for row in found if row["waiting"] is not None]
    controls = [row[CONTROL] for row in found if CONTROL in row]
    return {
        **_combined_ratio(found),
        **({CONTROL: _combined_ratio(controls)} if controls else {}),
        "rounds": sum(row["rounds"] for row in found),
        "waiting": statistics.median(waiting) if waiting else None,
        "processes": len(found),
    }


def _combined_ratio(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row with the median ratio, its interval the hull of all."""
    middle = sorted(found, key=lambda row: row["ratio"])[len(found) // 2]
    return {**middle, "low": min(row["low"] for row in found), "high": max(row["high"] for row in found)}
