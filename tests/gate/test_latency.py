"""The statistics of the speed verdict: intervals that cover, and machines that prove nothing."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from graphopt.gate import latency
from graphopt.gate.latency import BASELINE, CANDIDATE, CONTROL, Interval, Rounds
from graphopt.runtime import rounds
from tests._clock import Clock

Draw = Callable[[], float]


def rounds_of(draw: Draw, count: int, slowdown: float = 1.0, waiting: float | None = 0.0) -> Rounds:
    """Rounds as a machine gives them whose speed at every moment ``draw`` tells."""
    times: dict[str, list[float]] = {BASELINE: [], CANDIDATE: []}
    for _ in range(count):
        first, second = 10 * draw(), 10 * slowdown * draw()
        third, fourth = 10 * slowdown * draw(), 10 * draw()
        times[BASELINE] += [first, fourth]
        times[CANDIDATE] += [second, third]
    return Rounds(times, waiting)


def bursts(seed: int) -> Draw:
    """A machine whose load comes and goes: states that last for a while, and interruptions."""
    source, state = random.Random(seed), [1.0]

    def draw() -> float:
        if source.random() < 0.05:
            state[0] = 1 + abs(source.gauss(0, 0.5))
        interrupted = 3.0 if source.random() < 0.03 else 1.0
        return state[0] * interrupted * (1 + source.gauss(0, 0.05))

    return draw


def test_the_interval_covers_the_truth_although_neighbouring_rounds_are_alike() -> None:
    covered = 0
    for seed in range(100):
        found = rounds_of(bursts(seed), 64, 1.2).ratio()
        covered += found.low <= 1.2 <= found.high
    assert covered >= 93  # of 100; each is to be right with 95 %


def test_drift_cancels() -> None:
    clock = itertools.count()
    found = rounds_of(lambda: 1 + 0.001 * next(clock), 32).ratio()
    assert found.middle == pytest.approx(1, abs=1e-3)


def test_calls_that_were_interrupted_do_not_count() -> None:
    quiet = rounds_of(lambda: 1.0, 33, 1.1)
    times = {side: list(row) for side, row in quiet.times.items()}
    times[CANDIDATE][10:24] = [1e6] * 14  # seven rounds as a whole, fewer than a quarter
    times[BASELINE][30::2] = [1e6] * 18  # one call of each of these rounds
    found = Rounds(times)
    assert found.ratio().middle == pytest.approx(1.1)
    assert found.milliseconds(CANDIDATE).middle == pytest.approx(11)


def test_a_machine_that_is_slower_now_and_then_does_not_move_the_ratio() -> None:
    """As one whose host gives its cores to others: both sides of a round find the same."""
    for seed in range(20):
        source = random.Random(seed)
        times: dict[str, list[float]] = {BASELINE: [], CANDIDATE: []}
        for _ in range(128):
            slowness = source.uniform(1, 1.5)
            for side, ms in ((BASELINE, 10), (CANDIDATE, 5)):
                times[side] += [ms * slowness * (1 + abs(source.gauss(0, 0.02))) for _ in range(2)]
        assert Rounds(times).ratio().middle == pytest.approx(0.5, rel=0.005)


def test_the_looks_share_the_error() -> None:
    """The last interval is as wide as the early ones left it; the more looks were before, the wider."""
    found = rounds_of(bursts(0), 64)
    assert found.ratio(0.05) == found.ratio()
    later = rounds_of(bursts(0), 200)
    assert later.ratio(0.03) == later.ratio()
    assert later.ratio(0.005).half_width > later.ratio().half_width
    assert rounds_of(bursts(0), 300).ratio().half_width > 0


def test_intervals_of_few_blocks_are_student_s() -> None:
    """Quantiles from the tables: 2.365 of 7 degrees of freedom, 2.086 of 20, and in the end the normal's."""
    assert latency._student(0.975, 7) == pytest.approx(2.365, abs=0.02)
    assert latency._student(0.975, 20) == pytest.approx(2.086, abs=0.005)
    assert latency._student(0.975, 1e9) == pytest.approx(1.96, abs=1e-3)


def test_several_processes_make_one_ratio() -> None:
    rows = [
        {"ratio": r, "low": r - 0.02, "high": r + 0.01, "baseline_ms": ms, "rounds": 64, "waiting": w}
        for r, ms, w in ((0.5, 9.0, 0.1), (0.44, 8.0, None), (0.48, 10.0, 0.2))
    ]
    found = latency.combined(rows)
    assert (found["ratio"], found["low"], found["high"]) == (0.48, pytest.approx(0.42), 0.51)
    assert (found["baseline_ms"], found["rounds"], found["processes"]) == (10.0, 192, 3)
    assert found["waiting"] == pytest.approx(0.15)
    assert latency.combined([rows[1]])["waiting"] is None
    controls = [{"ratio": r, "low": r - 0.01, "high": r + 0.02} for r in (0.97, 0.95, 0.99)]
    found = latency.combined([{**row, CONTROL: c} for row, c in zip(rows, controls, strict=True)])
    assert found["ratio"] == 0.48
    assert found[CONTROL] == {"ratio": 0.97, "low": pytest.approx(0.94), "high": pytest.approx(1.01)}


def test_the_interval_is_in_milliseconds_too() -> None:
    found = rounds_of(lambda: 1.0, 20, 1.5)
    assert found.milliseconds(BASELINE).middle == pytest.approx(10)
    assert found.milliseconds(CANDIDATE).middle == pytest.approx(15)


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        (Interval(1.2, 1.1, 1.3), "beyond"),
        (Interval(0.9, 0.8, 1.0), "within"),
        (Interval(1.0, 0.8, 1.3), "unknown"),
        (Interval(1.04, 1.03, 1.06), "within"),  # narrow, and its middle keeps the limit
        (Interval(1.06, 1.04, 1.07), "unknown"),
        (Interval(math.nan, math.nan, math.nan), "unknown"),
    ],
)
def test_a_limit_is_broken_only_by_the_whole_interval(interval: Interval, told: str) -> None:
    assert interval.tell(1.05) == told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (rounds, latency):
        monkeypatch.setattr(module, "time", made)
    return made


def test_rounds_end_as_soon_as_they_can_tell(clock: Clock) -> None:
    sides = {BASELINE: clock.sleeping(0.002), CANDIDATE: clock.sleeping(0.004)}
    found = latency.measure(sides, [(BASELINE, 1.05)], seconds=60)
    assert clock.now < 5
    assert found.ratio().tell(1.05) == "beyond"
    assert len(found.times[BASELINE]) == len(found.times[CANDIDATE]) == 2 * found.count


def test_rounds_end_when_the_time_is_out(clock: Clock) -> None:
    sides = {BASELINE: clock.sleeping(0.001), CANDIDATE: clock.sleeping(0.001)}
    found = latency.measure(sides, [(BASELINE, 1.0)], seconds=0.01)
    assert found.count == 6


def test_every_limit_is_of_a_side_of_its_own(clock: Clock) -> None:
    """0.5 of the baseline's time is far below its limit, and at the limit to the control nothing can tell."""

    def measured(*limits: latency.Limit, precision: float = 0.0) -> Rounds:
        source = random.Random(0)
        sides = {
            BASELINE: clock.sleeping(0.004),
            CANDIDATE: lambda: clock.sleep(0.002 * (1 + abs(source.gauss(0, 0.1)))),
            CONTROL: clock.sleeping(0.002),
        }
        return latency.measure(sides, limits, seconds=60, precision=precision)

    few = measured((BASELINE, 0.7))
    to_control = few.ratio(to=CONTROL).middle
    assert to_control == pytest.approx(2 * few.ratio().middle)
    assert few.count == 64
    assert measured((BASELINE, 0.7), (CONTROL, to_control - 1e-4)).count > 64
    assert measured((BASELINE, 0.7), precision=1e-9).count == 256


def test_what_is_too_short_to_be_timed_is_called_several_times() -> None:
    calls = [0, 0]

    def call(side: int) -> Callable[[], None]:
        def run() -> None:
            calls[side] += 1

        return run

    sides = {BASELINE: call(0), CANDIDATE: call(1)}
    found = latency.measure(sides, [(BASELINE, 100.0)], seconds=0.01)
    assert calls[0] == calls[1] > 1000
    assert found.milliseconds(BASELINE).middle < 0.05


def test_the_clock_is_the_one_that_is_given() -> None:
    """As a GPU's does, it may know of time that passes while no call waits."""
    times = {"slow": 3.0, "fast": 2.0}
    sides: dict[str, Callable[[], str]] = {name: lambda name=name: name for name in times}  # type: ignore[misc]
    found = latency.measure(
        {BASELINE: sides["fast"], CANDIDATE: sides["slow"]},
        [(BASELINE, 1.05)],
        seconds=0.01,
        clock=lambda run: times[str(run())],
    )
    assert found.times == {BASELINE: [2.0] * 2 * found.count, CANDIDATE: [3.0] * 2 * found.count}
    assert found.ratio().middle == pytest.approx(1.5)


def test_a_call_runs_untimed_before_it_is_timed(clock: Clock) -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], None]:
        return lambda: (order.append(name), clock.sleep(0.002))[1]

    sides = {BASELINE: side("a"), CANDIDATE: side("b"), CONTROL: side("c")}
    found = latency.measure(sides, [(BASELINE, 100.0)], seconds=0.01)
    timed = order[-12 * found.count :]
    assert "".join(timed) == "aabbccccbbaa" * found.count


def test_a_machine_whose_threads_wait_proves_nothing() -> None:
    found = rounds_of(lambda: 1.0, 16, waiting=0.5)
    assert "its threads waited for a core 50% of the time" in latency.not_comparable(found, None)
    locked = {"waiting": 0.45, "baseline_ms": 10.0}
    assert (
        latency.not_comparable(found, locked) != ""
    )  # a lock that was written on a busy machine is no excuse
    threads = rounds_of(lambda: 1.0, 16, waiting=0.35)  # the process's own, more than there are cores
    assert latency.not_comparable(threads, {"waiting": 0.3, "baseline_ms": 10.0}) == ""
    assert latency.not_comparable(threads, {"waiting": 0.0, "baseline_ms": 10.0}) != ""


def test_a_machine_that_is_slower_than_it_was_proves_nothing() -> None:
    found = rounds_of(lambda: 2.0, 16)
    said = latency.not_comparable(found, {"waiting": 0.0, "baseline_ms": 10.0})
    assert "the baseline itself takes 2.00 times as long as for the lock" in said
    locked = {"waiting": 0.0, "baseline_ms": 10.0}
    assert latency.not_comparable(rounds_of(lambda: 1.0, 16), locked) == ""
    for slower, side, said in ((1.5, BASELINE, True), (1.5, CONTROL, False), (2.5, CONTROL, True)):
        found = rounds_of(lambda slower=slower: slower, 16)  # type: ignore[misc]
        assert bool(latency.not_comparable(found, locked, side)) == said


def test_where_the_system_tells_nothing_about_waiting_the_rounds_decide() -> None:
    assert latency.not_comparable(rounds_of(lambda: 1.0, 16, waiting=None), None) == ""


def test_blocks_of_neighbours_make_wider_intervals_than_single_rounds_where_load_lasts() -> None:
    load = np.repeat(np.random.default_rng(0).normal(size=16), 8)
    ends = []
    for slowness in (load, np.random.default_rng(1).permutation(load)):
        candidate = 10 * np.exp(0.1 * slowness)
        found = Rounds({BASELINE: [10.0] * 256, CANDIDATE: np.repeat(candidate, 2).tolist()}).ratio()
        ends.append(found.high - found.low)
    assert ends[0] > 1.5 * ends[1]
