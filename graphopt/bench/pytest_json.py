"""Rows in the format of pytest-benchmark's saved runs, so that `pytest-benchmark compare` reads them."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graphopt.bench.summary import label, measured
from graphopt.observe.files import write_text

_VERSION = "5.0.0"  # of the format: pytest-benchmark refuses what is older than 3


def write_pytest_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write every side of every case as a benchmark, grouped by case.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, json.dumps(converted(rows), indent=1, allow_nan=False) + "\n")


def converted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows as one saved run; cases that failed, and sides that are wrong, are not in it."""
    good = measured(rows)
    commit = good[-1]["commit"] if good else "unknown"
    return {
        "machine_info": {
            "node": platform.node(),
            "machine": platform.machine(),
            "python_version": good[-1]["versions"]["python"] if good else platform.python_version(),
            "cpu": {"brand_raw": ", ".join(dict.fromkeys(row["device_name"] for row in good))},
        },
        "commit_info": {"id": commit.removesuffix("+"), "dirty": commit.endswith("+")},
        "benchmarks": [_benchmark(row, side) for row in good for side in row["sides"] if "times_ms" in side],
        "datetime": datetime.now(UTC).isoformat(),
        "version": _VERSION,
    }


def _benchmark(row: dict[str, Any], side: dict[str, Any]) -> dict[str, Any]:
    name = f"{label(side)}[{row['case']}]"
    return {
        "group": row["case"],
        "name": name,
        "fullname": name,
        "params": {"case": row["case"], "side": label(side)},
        "param": row["case"],
        "extra_info": {key: row[key] for key in ("command", "device", "dtype", "seed")},
        "options": {"warmup": True, "timer": "graphopt.runtime.rounds"},
        "stats": _stats([value / 1e3 for value in side["times_ms"]]),
    }


def _stats(seconds: Sequence[float]) -> dict[str, Any]:
    """The statistics that pytest-benchmark keeps of a benchmark, in seconds."""
    q1, median, q3 = statistics.quantiles(seconds, n=4)
    mean, stddev, iqr = statistics.mean(seconds), statistics.stdev(seconds), q3 - q1
    inside = [value for value in seconds if q1 - 1.5 * iqr <= value <= q3 + 1.5 * iqr]
    far = sum(abs(value - mean) > stddev for value in seconds)
    outside = len(seconds) - len(inside)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": stddev,
        "rounds": len(seconds),
        "median": median,
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": outside,
        "stddev_outliers": far,
        "outliers": f"{far};{outside}",
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "ops": 1 / mean,
        "total": sum(seconds),
        "data": list(seconds),
        "iterations": 1,
    }
