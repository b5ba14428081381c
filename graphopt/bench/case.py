"""A case: graphopt and its peers on one model in one process, interleaved, all checked against float64."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.bench.peers import PEERS, Run, eager, tensors
from graphopt.compiler.compare import worst_error
from graphopt.compiler.evaluate import widen
from graphopt.observe.machine import commit, cpu_name
from graphopt.observe.memory import PeakMemory
from graphopt.observe.snapshot import versions
from graphopt.runtime.rounds import interleave, quartiles, ratio

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
        "ms": {side: quartiles(row) for side, row in times.items()},
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


def context(setting: Setting) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "device": cpu_name(),
        "threads": setting.threads,
        "rounds": setting.rounds,
        "versions": versions(),
        "commit": commit(Path.cwd()),
        "date": time.strftime("%Y-%m-%d"),
    }
