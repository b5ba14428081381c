"""Runs a suite: graphopt and its peers in one process, interleaved, all of them checked against float64."""

from __future__ import annotations

import copy
import os
import platform
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import graphopt
from bench.peers import PEERS, Run, eager, tensors
from graphopt.compiler.compare import worst_error
from graphopt.compiler.evaluate import widen
from graphopt.observe.snapshot import versions

RESULTS = Path(__file__).parent / "results"
_MODEL_ERROR = 1e-4  # relative to float64: a side that is further off computed something else


@dataclass(frozen=True)
class Setting:
    """How long and how often to measure.

    Args:
        rounds: rounds a case; each runs every side once forwards and once backwards.
        threads: of every side.
    """

    rounds: int = 40
    threads: int = 2


def run_case(name: str, make: Callable[[], Any], peers: list[str], setting: Setting) -> dict[str, Any]:
    """Measure one case.

    Returns:
        A JSON-ready row: medians and quartiles in milliseconds by side, each side's error against float64,
        the ratio of every peer to graphopt with its 95% bootstrap interval, the noise floor (graphopt against
        itself), optimize time in seconds and its peak memory over what the process held before, in bytes.
    """
    torch.set_num_threads(setting.threads)
    model, args, kwargs = make()
    watch = PeakMemory()
    start = time.perf_counter()
    with watch:
        optimized = graphopt.optimize(model, args, kwargs)
    seconds = time.perf_counter() - start
    sides: dict[str, Run] = {"graphopt": _side(optimized, args, kwargs)}
    sides |= {peer: PEERS[peer](model, args, kwargs) for peer in peers}
    sides["graphopt again"] = sides["graphopt"]
    reference = _float64(model, args, kwargs)
    errors = {side: worst_error(run(), reference) for side, run in sides.items()}
    times = interleave(sides, setting.rounds)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    own = times["graphopt"]
    return {
        "case": name,
        "ms": {side: _quartiles(row) for side, row in times.items()},
        "error": errors,
        "wrong": [side for side, error in errors.items() if not error < _MODEL_ERROR],
        "ratio": {peer: ratio(times[peer], own) for peer in peers},
        "noise": ratio(times["graphopt again"], own),
        "chosen": optimized.report.chosen.name,
        "optimize_s": round(seconds, 2),
        "optimize_peak_bytes": watch.peak,
        "weights_bytes": weights,
        "ops": optimized.report.ops_after,
        **context(setting),
    }


def _side(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    return eager(model, args, kwargs)


def _float64(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The outputs of a float64 copy of the model, on its inputs in float64."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        return tensors(wide(*widen(args), **widen(dict(kwargs))))


def interleave(sides: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Times in milliseconds, in rounds of A B C, C B A, so that drift hits every side alike."""
    names = list(sides)
    for name in names:
        for _ in range(3):
            sides[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in (*names, *reversed(names)):
            start = time.perf_counter()
            sides[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


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


def _quartiles(row: list[float]) -> dict[str, float]:
    lower, middle, upper = statistics.quantiles(row, n=4)
    return {"median": round(middle, 3), "lower": round(lower, 3), "upper": round(upper, 3)}


class PeakMemory:
    """The most resident memory that the process holds inside the block, over its start, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        start = resident_bytes()

        def watch() -> None:
            while not self._done.wait(0.005):
                self.peak = max(self.peak, resident_bytes() - start)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def resident_bytes() -> int:
    """Resident memory of this process, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def context(setting: Setting) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "device": _cpu_name(),
        "threads": setting.threads,
        "rounds": setting.rounds,
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def commit() -> str:
    """The commit measured, with a mark when the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed.strip() else "")
