"""What is written for pytest-benchmark is what pytest-benchmark reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.stats import Stats

from graphopt.bench.pytest_json import converted, write_pytest_json
from graphopt.bench.setting import Case
from tests.bench._rows import failing, row

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("zoo:block", {"batch": 8})


def test_the_statistics_are_pytest_benchmarks_own() -> None:
    found = converted([row(CASE, 1.0, {"eager": 3.0}, spread=0.3)])["benchmarks"]
    assert [entry["name"] for entry in found] == [f"graphopt, ort[{CASE.name}]", f"eager[{CASE.name}]"]
    for entry in found:
        stats = Stats()
        for value in entry["stats"]["data"]:
            stats.update(value)
        for name in ("min", "max", "mean", "stddev", "rounds", "median", "ops", "total", "stddev_outliers"):
            assert entry["stats"][name] == pytest.approx(getattr(stats, name)), name


def test_its_command_compares_two_runs(tmp_path: Path) -> None:
    for name, own in (("before", 2.0), ("after", 1.0)):
        write_pytest_json(tmp_path / f"{name}.json", [row(CASE, own, {"eager": 3.0}), failing(CASE, "x")])
    command = [
        sys.executable,
        "-m",
        "pytest_benchmark",
        "compare",
        "before.json",
        "after.json",
        "--sort=mean",
    ]
    done = subprocess.run(
        [*command, "--csv=found.csv"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "graphopt, ort" in done.stdout + done.stderr
    header, *lines = (tmp_path / "found.csv").read_text().splitlines()
    places = {name: index for index, name in enumerate(header.split(","))}
    own = [line for line in lines if "graphopt" in line]
    assert len(own) == 2
    assert "median" in places


@pytest.mark.slow
def test_the_suites_run_under_pytest_benchmark_and_compare(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "bench/test_speed.py", "-k", "scaling and seq-16 and eager"]
    command += ["-p", "no:xdist", "--benchmark-min-rounds=3", "--benchmark-max-time=0.2"]
    command += [f"--benchmark-storage={tmp_path}", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    for option in ("--benchmark-autosave", "--benchmark-compare"):
        done = subprocess.run(
            [*command, option], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "(0001_" in done.stdout  # the saved run, beside this one
    (saved,) = tmp_path.rglob("*.json")
    (entry,) = json.loads(saved.read_text())["benchmarks"]
    assert entry["group"].startswith("bench.models:encoder")
