"""Energy is read where the system tells, and is absent elsewhere."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from graphopt.observe import energy
from graphopt.observe.energy import Counter


def package(folder: Path, index: int, microjoules: int, wraps: int = 10**9) -> Path:
    place = folder / f"intel-rapl:{index}"
    place.mkdir()
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{wraps}\n")
    return place


def test_joules_of_a_call_are_a_mean_over_many() -> None:
    counts = itertools.count(0, 8)
    calls: list[None] = []
    found = Counter(lambda: next(counts)).joules(lambda: calls.append(time.sleep(0.01)), seconds=0.1)
    assert found == pytest.approx(8 / len(calls))


def test_a_counter_that_wrapped_is_unwrapped() -> None:
    counts = iter([95.0, 5.0])
    assert Counter(lambda: next(counts), wraps=100.0).joules(lambda: time.sleep(0.2), seconds=0.1) == 10.0


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    first = package(tmp_path, 0, 3_000_000)
    package(tmp_path, 1, 4_000_000)
    core = tmp_path / "intel-rapl:0:0"
    core.mkdir()
    (core / "energy_uj").write_text("1000000\n")
    found = energy._cpu(tmp_path)
    assert found is not None
    assert found.read() == 7.0
    (first / "energy_uj").write_text("5000000\n")
    assert found.read() == 9.0


def test_one_package_tells_when_it_wraps(tmp_path: Path) -> None:
    package(tmp_path, 0, 3_000_000, wraps=262_000_000)
    found = energy._cpu(tmp_path)
    assert found is not None
    assert found.wraps == 262.0


def test_where_nothing_tells_there_is_no_counter(tmp_path: Path) -> None:
    assert energy._cpu(tmp_path) is None
    place = package(tmp_path, 0, 1)
    (place / "energy_uj").write_text("not a number\n")
    assert energy._cpu(tmp_path) is None
    (place / "energy_uj").unlink()
    assert energy._cpu(tmp_path) is None
