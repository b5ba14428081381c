"""The choice between candidates: who is timed how often, and what of it is kept."""

from __future__ import annotations

import pytest
import torch

from graphopt.runtime import rounds
from graphopt.runtime.measure import interleaved
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


def test_one_that_is_hopeless_is_not_called_again(clock: Clock) -> None:
    calls = [0, 0]

    def slow() -> None:
        calls[0] += 1
        clock.sleep(0.1)

    def fast() -> None:
        calls[1] += 1
        clock.sleep(0.01)

    hopeless, best = interleaved([slow, fast], seconds=1.0, device=CPU)
    assert calls == [4, 4 + 2 * 50]
    assert (hopeless.rounds, best.rounds) == (2, 50)
    assert hopeless.median_ms == pytest.approx(100.0)


def test_quick_calls_are_judged_in_a_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_SETTLING_MS", 15.0)
    found = interleaved([clock.sleeping(0.001)] * 2, seconds=4.0, device=CPU)
    spent = 2 * (2 * 16 + found[0].rounds * 16) * 1e-3
    assert 1.0 <= spent < 1.2
    assert [row.median_ms for row in found] == pytest.approx([1.0] * 2)


def test_however_long_a_call_takes_there_are_quartiles(clock: Clock) -> None:
    (found,) = interleaved([clock.sleeping(10.0)], seconds=0.1, device=CPU)
    assert (found.rounds, found.spread_ms) == (6, pytest.approx(0.0))
