"""The method: order of the calls, the clock, the interval, and what may be claimed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from graphopt.runtime.rounds import (
    Interrupted,
    clock_of,
    interleave,
    noise_floor,
    quartiles,
    ratio,
    verdict,
)


def sleeping(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_a_side_that_sleeps_longer_is_found_slower() -> None:
    times = interleave({"short": sleeping(0.002), "long": sleeping(0.06)}, rounds=8)
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


def test_time_ends_the_rounds_but_not_before_the_third() -> None:
    times = interleave({"a": sleeping(0.01)}, rounds=1000, seconds=0.2)
    assert 6 <= len(times["a"]) <= 22
    assert len(interleave({"a": sleeping(0.01)}, rounds=1000, seconds=0)["a"]) == 6


def test_progress_reaches_the_end_by_rounds_or_by_time() -> None:
    seen: list[float] = []
    interleave({"a": sleeping(0)}, rounds=4, on_round=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    seen.clear()
    interleave({"a": sleeping(0.01)}, rounds=1000, seconds=0.1, on_round=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] > 0.7


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
    assert interleave({"a": sleeping(0)}, rounds=2, clock=lambda run: 7.0) == {"a": [7.0] * 4}


def test_a_devices_clock_times_the_second_of_two_calls() -> None:
    naps = iter((0.05, 0.0, 0.0, 0.05))
    side = lambda: time.sleep(next(naps))  # noqa: E731
    clock = clock_of(torch.device("cpu"))
    assert clock(side) < 25 < clock(side)


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
