"""A case: graphopt and its peers on one model in one process, interleaved, all checked against float64."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.bench.inputs import real_only
from graphopt.bench.loss import lost
from graphopt.bench.peer import Problem, eager
from graphopt.bench.peers import PEERS
from graphopt.bench.problem import Model, device_named, own_stream, pose
from graphopt.bench.results import results
from graphopt.bench.rows import FORMAT, SCHEMA
from graphopt.bench.setting import Case, Row, Setting, command_of
from graphopt.bench.side import BUILD, OWN, Side, Tell, build_peers, check, time_sides
from graphopt.capture.export import capture_any
from graphopt.compiler.compare import Comparison
from graphopt.compiler.reference import computed, output_reference
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.observe.energy import counter
from graphopt.observe.machine import commit, device_name, driver
from graphopt.observe.memory import PeakMemory
from graphopt.observe.snapshot import versions
from graphopt.optimized_model import OptimizedModel
from graphopt.packing import Padding
from graphopt.precision import EXACT, default_max_loss

_PEER_PACKAGES = ("openvino", "tensorrt", "torch-tensorrt", "torchvision", "triton")


def run_case(
    case: Case,
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    setting: Setting,
    *,
    tell: Tell = lambda what, done: None,
    crashed: Mapping[str, str] | None = None,
    artifact: Callable[[OptimizedModel], dict[str, Any]] | None = None,
) -> Row:
    """Measure one case.

    Args:
        case: what it is called, and what is done to the model first.
        model: as its SPEC makes it.
        args: its inputs.
        kwargs: its keyword inputs.
        setting: how long, against whom.
        tell: called with (what is being done, fraction done).
        crashed: sides that took an earlier process down, by key, and how; they are not tried again.
        artifact: measures the optimized model on disk.

    Returns:
        A row, as CONTRIBUTING.md describes it.

    Raises:
        InputError: dtype, lengths or device do not fit the model.
        GraphoptError: graphopt cannot optimize the model.
        KeyboardInterrupt: before there was enough to keep.
    """
    problem, lengths = pose(
        model,
        args,
        kwargs,
        device=case.device,
        dtype=case.dtype,
        lengths=case.lengths,
        seed=case.seed,
    )
    max_loss = default_max_loss(case.precision, None)
    problem = dataclasses.replace(problem, precision=case.precision, max_loss=max_loss or 0.0)
    given = problem if isinstance(model, torch.nn.Module) else None
    own_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(setting.threads or own_threads)
        with own_stream(problem.device):
            tell("reference", 0.02)
            captured, inputs = capture_any(model, *_inputs(given))
            reference = output_reference(captured, inputs, MODEL_FLOOR_ULPS)

            def compare(found: list[torch.Tensor]) -> Comparison:
                values = computed(captured, found)
                if max_loss is not None:  # peers return what they compute in
                    values = [
                        value.to(wanted.dtype) if isinstance(value, torch.Tensor) else value
                        for value, wanted in zip(values, reference.before, strict=True)
                    ]
                if lengths is not None:
                    values = real_only(values, reference, problem.kwargs["attention_mask"])
                if max_loss is not None:
                    return lost(values, reference.float64, max_loss)
                return reference.compare(values)

            padding: Padding = "keep" if lengths is None else "remove"
            optimized, cost = _optimized(model, given, problem, padding, tell)
            if artifact is not None:
                tell("artifact", 0.28)
                cost |= artifact(optimized)
            run = eager(optimized, problem.args, problem.kwargs)
            report = optimized.report
            own = Side(OWN, report.chosen.name, run, precision=report.precision)
            sides, missing = build_peers(problem, setting.against, tell, crashed or {})
            for side in (own, *sides):
                tell(BUILD + side.key, 0.5)
                check(side, compare)
            times = time_sides(own, sides, problem.device, setting.rounds, setting.seconds, tell)
            return {
                "format": FORMAT,
                "schema": SCHEMA,
                "case": case.name,
                **_asked(case, problem),
                "lengths": lengths,
                **_allowed(case.precision, max_loss),
                **results(own, sides, times, counter(problem.device)),
                "missing": missing,
                "optimize": cost,
                **_context(case, setting, problem),
            }
    finally:
        torch.set_num_threads(own_threads)
        shutil.rmtree(problem.folder, ignore_errors=True)


def failed_row(case: Case, setting: Setting, failed: Mapping[str, Any]) -> Row:
    """The row of a case that could not be measured.

    Args:
        case: the case.
        setting: as it was to be measured.
        failed: ``message``, ``where`` in the user's code and ``hint``, if there are any, and the ``code``
            that a run of this case alone ends with.
    """
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "case": case.name,
        "spec": case.spec,
        "sizes": dict(case.sizes),
        "dtype": case.dtype,
        "device": case.device,
        "seed": case.seed,
        **_allowed(case.precision, default_max_loss(case.precision, None)),
        "failed": {key: value for key, value in failed.items() if value is not None},
        **context(device_named(case.device)),
        "command": command_of(case, setting),
    }


def _allowed(precision: str, max_loss: float | None) -> Row:
    """What may be lost; nothing is said of an exact case."""
    return {} if precision == EXACT else {"precision": precision, "max_loss": max_loss}


def _asked(case: Case, problem: Problem) -> Row:
    """What was measured: as it was asked for, and what became of it."""
    return {
        "spec": case.spec,
        "sizes": dict(case.sizes),
        "dtype": _name(problem.dtype),
        "device": str(problem.device),
        "seed": case.seed,
        "inputs": [f"{_name(tensor.dtype)} {list(tensor.shape)}" for tensor in problem.inputs],
        "model": f"{type(problem.model).__module__}.{type(problem.model).__qualname__}",
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inputs(problem: Problem | None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The example inputs; none for a program, which brings its own."""
    return ((), {}) if problem is None else (problem.args, problem.kwargs)


def _optimized(
    model: Model, given: Problem | None, problem: Problem, padding: Padding, tell: Tell
) -> tuple[OptimizedModel, dict[str, Any]]:
    """Optimize twice: cold is the first time in a fresh process, warm the second.

    Of a ragged batch only real tokens are compared, so that padding may be removed.
    """
    on_gpu = problem.device.type == "cuda"
    seconds, optimized = [], None
    for name, done in (("cold", 0.05), ("warm", 0.18)):
        tell(f"optimize, {name}", done)
        optimized = None  # one at a time in memory
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(problem.device)
            held = torch.cuda.memory_allocated(problem.device)
        watch, start = PeakMemory(), time.perf_counter()
        with watch:
            optimized = graphopt.optimize(
                model, *_inputs(given), padding=padding, precision=problem.precision
            )
        seconds.append(round(time.perf_counter() - start, 3))
        if name == "cold":
            peak = watch.peak
            device_peak = torch.cuda.max_memory_allocated(problem.device) - held if on_gpu else None
    assert optimized is not None
    weights = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    cost = {
        "cold_s": seconds[0],
        "warm_s": seconds[1],
        "peak_bytes": peak,
        "weights_bytes": weights,
        "ops": optimized.report.ops_after,
    }
    return optimized, cost | ({"peak_device_bytes": device_peak} if on_gpu else {})


def _context(case: Case, setting: Setting, problem: Problem) -> Row:
    """Where and with what a row was measured, and how to measure it again."""
    peers = [name for name in setting.against if not PEERS[name].absent(problem.device)]
    alone = {name: dataclasses.replace(setting, against=(name,)) for name in peers}
    return {
        "rounds": setting.rounds,
        "seconds": setting.seconds,
        **context(problem.device),
        "command": command_of(case, setting),
        "commands": {name: command_of(case, only) for name, only in alone.items()},
    }


def context(device: torch.device) -> Row:
    """Where, when and with what something is measured."""
    return {
        "device_name": device_name(device),
        "driver": driver(),
        "threads": torch.get_num_threads(),
        "versions": versions(*_PEER_PACKAGES),
        "commit": commit(Path.cwd()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
