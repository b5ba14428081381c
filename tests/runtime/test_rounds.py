"""The method: order of the calls, the clock, the interval, and what may be claimed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from graphopt.runtime import rounds
from graphopt.runtime.rounds import (
    Interrupted,
    clock_of,
    interleave,
    noise_floor,
    quartiles,
    ratio,
    verdict,
)
from tests._clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rounds, "time", made)
    return made


def test_a_side_that_takes_longer_is_found_slower(clock: Clock) -> None:
    times = interleave({"short": clock.sleeping(0.002), "long": clock.sleeping(0.06)}, rounds=8)
    assert times == {"short": [pytest.approx(2.0)] * 16, "long": [pytest.approx(60.0)] * 16}
    found = ratio(times["long"], times["short"])
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["low"] > 1.5
    assert verdict(found, floor=0.1) == "faster"
    assert verdict(ratio(times["short"], times["long"]), floor=0.1) == "slower"


def test_equal_sides_have_an_interval_around_one() -> None:
    source = random.Random(1)
    rows = [[source.gauss(10, 1) for _ in range(200)] for _ in range(2)]
    found = ratio(*rows)
    assert found["low"] < 1 < found["high"]
    assert verdict(found, floor=0.0) == "level"


def test_rounds_run_forwards_and_backwards() -> None:
    order: list[str] = []
    sides = {name: (lambda name=name: order.append(name)) for name in "abc"}
    interleave(sides, rounds=2)
    assert "".join(order[9:]) == "abccba" * 2  # nine warm-up calls first


def test_time_ends_the_rounds_but_not_before_the_third(clock: Clock) -> None:
    side = {"a": clock.sleeping(1.0)}
    assert len(interleave(side, rounds=1000, seconds=19.0)["a"]) == 20  # a round that began is ended
    assert len(interleave(side, rounds=1000, seconds=0)["a"]) == 6


def test_progress_reaches_the_end_by_rounds_or_by_time(clock: Clock) -> None:
    seen: list[float] = []
    interleave({"a": clock.sleeping(0)}, rounds=4, on_round=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    seen.clear()
    interleave({"a": clock.sleeping(1.0)}, rounds=1000, seconds=8.0, on_round=seen.append)
    assert seen == pytest.approx([0.001, 0.25, 0.5, 0.75])  # as told, of the time before the round


def test_an_interrupt_keeps_the_complete_rounds_alone() -> None:
    calls = iter(range(100))

    def side() -> None:
        if next(calls) == 6 + 4 * 2 + 3:  # in the third round, after half of it
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        interleave({"a": side, "b": side}, rounds=5)
    assert {name: len(row) for name, row in caught.value.times.items()} == {"a": 4, "b": 4}


def test_an_interrupt_in_the_warm_up_is_an_ordinary_one() -> None:
    def side() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interleave({"a": side}, rounds=5)
    assert not isinstance(caught.value, Interrupted)


def test_a_given_clock_is_asked() -> None:
    assert interleave({"a": lambda: None}, rounds=2, clock=lambda run: 7.0) == {"a": [7.0] * 4}


def test_a_devices_clock_times_a_call_after_others_of_the_same_side(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "_SETTLING_MS", 15.0)
    naps = iter((0.05, 0.0, 0.008, 0.008, 0.05))
    timed = clock_of(torch.device("cpu"))
    assert [timed(lambda: clock.sleep(next(naps))) for _ in range(2)] == pytest.approx([0.0, 50.0])


def test_a_long_call_is_timed_at_once(clock: Clock) -> None:
    naps = iter((0.5, 0.499, 0.6))
    timed = clock_of(torch.device("cpu"))
    assert [timed(lambda: clock.sleep(next(naps))) for _ in range(2)] == pytest.approx([500.0, 600.0])


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_the_order_of_what_a_gpus_clock_does(monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    """Without a GPU, its interface is a fake one that writes down what it is asked for."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait for the event")

        def elapsed_time(self, end: Any) -> float:
            return 1.25

    class Flush:
        def zero_(self) -> None:
            order.append("empty the cache")

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> Flush:
        assert (size, dtype, device) == (4 * 50 * 2**20, torch.int8, gpu)
        return Flush()

    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(rounds, "l2_bytes", lambda device: 50 * 2**20)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(f"wait for {device}"))
    assert clock_of(gpu, cold=cold)(lambda: order.append("run")) == 1.25
    flush = ["empty the cache"] if cold else []
    assert order == ["run", "wait for cuda:1", *flush, "record", "run", "record", "wait for the event"]


@pytest.mark.gpu
@pytest.mark.parametrize("cold", [False, True])
def test_the_gpus_clock_waits_for_the_kernels(cold: bool) -> None:
    small, large = (torch.randn(n, n, device="cuda") for n in (64, 4096))
    sides = {"small": lambda: small @ small, "large": lambda: large @ large}
    times = interleave(sides, rounds=5, clock=clock_of(small.device, cold=cold))
    assert min(times["large"]) > 5 * max(times["small"][2:])


def test_the_floor_is_the_far_end_of_the_interval_in_either_direction() -> None:
    assert noise_floor({"ratio": 1.0, "low": 0.8, "high": 1.1}) == pytest.approx(0.25)
    assert noise_floor({"ratio": 1.0, "low": 0.95, "high": 1.3}) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("found", "floor", "said"),
    [
        ((1.2, 1.1, 1.3), 0.1, "faster"),
        ((1.2, 1.1, 1.3), 0.3, "level"),  # below the noise floor
        ((1.2, 0.9, 1.5), 0.0, "level"),  # the interval holds 1
        ((0.8, 0.7, 0.9), 0.1, "slower"),
        ((0.8, 0.7, 0.9), 0.3, "level"),
        ((0.8, 0.7, 1.0), 0.1, "level"),
    ],
)
def test_no_claim_below_the_noise(found: tuple[float, float, float], floor: float, said: str) -> None:
    assert verdict(dict(zip(("ratio", "low", "high"), found, strict=True)), floor) == said


def test_quartiles() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "lower": 1.5, "upper": 4.5}
