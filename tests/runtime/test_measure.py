"""The choice between candidates: who is timed how often, and what of it is kept."""

from __future__ import annotations

import pytest
import torch

from graphopt.runtime import rounds
from graphopt.runtime.measure import interleaved, warmed_up
from tests._clock import Clock

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rounds, "time", made)
    return made


def test_candidates_take_turns_forwards_and_backwards(clock: Clock) -> None:
    order: list[str] = []
    sides = [lambda name=name: (order.append(name), clock.sleep(0.001)) for name in "abc"]
    found = interleaved(sides, seconds=0.03, device=CPU)
    assert "".join(order) == "aaaabbbbcccc" + "aabbccccbbaa" * 3  # every other call is not timed
    assert [row.rounds for row in found] == [6, 6, 6]
    assert [row.median_ms for row in found] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(("ms", "tried"), [(100.0, 6), (300.0, 4), (2000.0, 2)])
def test_one_that_stays_hopeless_is_not_called_again(ms: float, tried: int, clock: Clock) -> None:
    fast = Calls(clock, 10.0)
    slow = Calls(clock, ms)
    hopeless, best = interleaved([slow, fast], seconds=1.0, device=CPU)
    settled = 1 if ms >= 500 else 2
    assert (slow.made, fast.made) == (settled * tried, 4 + 2 * 50)
    assert (hopeless.rounds, best.rounds) == (tried, 50)
    assert hopeless.median_ms == pytest.approx(ms)


class Calls:
    """A side of so many milliseconds; of more in its first calls."""

    def __init__(self, clock: Clock, ms: float, first_ms: float = 0.0, first: int = 0) -> None:
        self.clock, self.ms, self.first_ms, self.first, self.made = clock, ms, first_ms, first, 0

    def __call__(self) -> None:
        self.made += 1
        self.clock.sleep((self.first_ms if self.made <= self.first else self.ms) / 1e3)


def test_first_calls_that_take_long_do_not_make_one_hopeless(clock: Clock) -> None:
    sides = [Calls(clock, 10.0), Calls(clock, 8.0, first_ms=90.0, first=6)]
    found = interleaved(sides, seconds=4.0, device=CPU)
    assert found[1].rounds == 50
    assert found[1].lower_ms == pytest.approx(8.0)
    best = found[1].lower_ms
    assert warmed_up(Calls(clock, 9.0, first_ms=90.0, first=4), best, CPU).lower_ms == pytest.approx(9.0)
    assert warmed_up(Calls(clock, 9.0), best, CPU).rounds == 2
    assert warmed_up(Calls(clock, 20.0), best, CPU).rounds == 6


def test_quick_calls_are_judged_in_a_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_SETTLING_MS", 15.0)
    found = interleaved([clock.sleeping(0.001)] * 2, seconds=4.0, device=CPU)
    spent = 2 * (2 * 16 + found[0].rounds * 16) * 1e-3
    assert 1.0 <= spent < 1.2
    assert [row.median_ms for row in found] == pytest.approx([1.0] * 2)


def test_however_long_a_call_takes_there_are_quartiles(clock: Clock) -> None:
    (found,) = interleaved([clock.sleeping(10.0)], seconds=0.1, device=CPU)
    assert (found.rounds, found.spread_ms) == (6, pytest.approx(0.0))
