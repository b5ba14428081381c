"""A model of the lock: made, captured, optimized and looked at; nothing here is timed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch

from graphopt.capture.export import capture_any
from graphopt.capture.outputs import select
from graphopt.cli import _config, _options, _spec
from graphopt.compiler.device import gpu_limits
from graphopt.compiler.evaluate import outputs as evaluated
from graphopt.compiler.manager import PassManager
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.remarks import Remarks
from graphopt.errors import InputError, SpecError, said
from graphopt.gate import host, serve
from graphopt.gate.facts import Subject, facts_of
from graphopt.gate.lock import Entry
from graphopt.ir.graph import Graph
from graphopt.observe.report import BASELINE, Candidate
from graphopt.optimize import optimize
from graphopt.optimized_model import OptimizedModel
from graphopt.passes.default import pipeline
from graphopt.precision import EXACT, default_max_loss, passes_of
from graphopt.runtime import scheduler
from graphopt.runtime.target import Target

Progress = Callable[[str, float], None]
_DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Config:
    """How a model of the lock is made and optimized, as the command line had it.

    Args:
        spec: leads to the model.
        target: a device, or the name of a GPU that need not be here.
        executors: insisted on, by comma.
        dynamic: dynamic dimensions.
        outputs: kept outputs.
        level: of optimization; None leaves it to pyproject.toml.
        enable: passes to run.
        disable: passes to leave out.
        max_loss: of passes that lose something.
        batch: of made inputs.
        seq: likewise, tokens.
        precision: narrower numbers to try; None leaves it to pyproject.toml.
        calibration: names the function that gives further inputs for their ranges.
    """

    spec: str
    target: str = "auto"
    executors: str | None = None
    dynamic: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    level: int | None = None
    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    max_loss: float | None = None
    batch: int = 1
    seq: int | None = None
    precision: str | None = None
    calibration: str | None = None

    @property
    def elsewhere(self) -> bool:
        """True for a GPU that is named and not used."""
        return not _DEVICES.fullmatch(self.target)

    @staticmethod
    def of(entry: Entry, name: str) -> Config:
        """The configuration of a lock's entry.

        Raises:
            InputError: the entry has settings that this graphopt does not know.
        """
        found = entry["config"]
        runs = entry.get("runs", {})
        wrong = [key for key, value in found.items() if not isinstance(value, _TYPES.get(key, ()))]
        wrong += sorted({"spec"} - found.keys())
        if not isinstance(runs, dict) or not isinstance(runs.get("executors"), list | None):
            wrong.append("runs")
        if isinstance(runs, dict) and not isinstance(runs.get("precision"), str | None):
            wrong.append("runs")
        if wrong:
            raise InputError(
                f"the lock's config of {name} does not read: {wrong[0]} = {found.get(wrong[0])!r}",
                hint="take the lock from version control, or write this entry again: graphopt lock --force",
            )
        rows: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return Config(**rows)


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("spec", "target"), (str,)),
    **dict.fromkeys(("dynamic", "outputs", "enable", "disable"), (list,)),
    **dict.fromkeys(("level", "seq"), (int, NoneType)),
    **dict.fromkeys(("executors", "precision", "calibration"), (str, NoneType)),
    "max_loss": (int, float, NoneType),
    "batch": (int,),
}


@dataclass(frozen=True)
class Prepared:
    """A model, captured, and everything that a check of it depends on.

    Args:
        config: how it is made.
        loaded: what the SPEC led to.
        captured: its graph.
        inputs: flat tensors.
        passes: what will rewrite it.
        host: what its forward asks of the host.
        calibration: further inputs, for ranges.
    """

    config: Config
    loaded: _spec.Loaded
    captured: Graph
    inputs: list[torch.Tensor]
    passes: list[Pass]
    host: dict[str, Any]
    calibration: list[Any]

    @property
    def original(self) -> torch.nn.Module:
        """The model as a module."""
        model = self.loaded.model
        return model if isinstance(model, torch.nn.Module) else model.module()

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example arguments."""
        if isinstance(self.loaded.model, torch.nn.Module):
            return tuple(self.loaded.args), dict(self.loaded.kwargs)
        args, kwargs = self.loaded.model.example_inputs
        return tuple(args), dict(kwargs)


def prepare(config: Config) -> Prepared:
    """Load and capture a model.

    Raises:
        GraphoptError: the SPEC, an option or the capture fails.
    """
    chosen = _config.passes(config.level, config.enable, config.disable)
    casts = passes_of(_config.precision(config.precision))
    passes = pipeline(chosen.level, (*chosen.enable, *casts), chosen.disable)
    if config.elsewhere:
        gpu_limits(config.target)
    target = "cpu" if config.elsewhere else config.target
    loaded = _spec.load(config.spec, batch=config.batch, seq=config.seq, target=target)
    dynamic = _options.dynamic(config.dynamic)
    captured, inputs = capture_any(loaded.model, loaded.args, loaded.kwargs, dynamic=dynamic)
    select(captured, _options.outputs(config.outputs))
    made = Prepared(config, loaded, captured, inputs, passes, {}, _spec.calibration(config.calibration))
    args, kwargs = made.call
    return replace(made, host=host.watch(lambda: made.original(*args, **kwargs)))


@dataclass(frozen=True)
class Examined:
    """A model, optimized and looked at.

    Args:
        facts: of it.
        optimized: it, where its target is here.
    """

    facts: dict[str, Any]
    optimized: OptimizedModel | None = None


def examine(prepared: Prepared, runs: Mapping[str, Any], metric: str | None, progress: Progress) -> Examined:
    """Optimize a model and gather its facts; nothing is timed.

    Args:
        prepared: the model.
        runs: the lock's choice of executors: see ``choice``.
        metric: names the function that is the task's metric.
        progress: called with what is being done.
    """
    if prepared.config.elsewhere:
        return Examined(_elsewhere(prepared, progress))
    optimized = optimized_by(prepared, runs, "fast", progress)
    progress("examine", 0.6)
    report, plan = optimized.report, optimized.plan
    subject = Subject(
        captured=prepared.captured,
        inputs=prepared.inputs,
        graphs=[step.region.graph for step in plan.steps],
        outputs=scheduler.run(plan, prepared.inputs),
        rewrites=report.rewrites,
        remarks=report.remarks,
        passes=prepared.passes,
        limits=Target(plan.device).limits,
        host=prepared.host,
        plan=plan,
        node_times=report.node_times,
        chosen=report.chosen.name,
        max_loss=_allowed(prepared.config, report.precision),
    )
    facts = facts_of(subject)
    facts["serve"] = serve.served(plan, prepared.inputs)
    facts["metric"] = _metric(metric, prepared.original, optimized)
    return Examined(facts, optimized)


def _allowed(config: Config, precision: str) -> float | None:
    """What a model that runs in a precision may lose; None where it runs in its own."""
    if precision == EXACT:
        return None
    return default_max_loss(precision, None) if config.max_loss is None else config.max_loss


def optimized_by(
    prepared: Prepared, runs: Mapping[str, Any], effort: str, progress: Progress | None
) -> OptimizedModel:
    config, loaded = prepared.config, prepared.loaded
    chosen = _config.passes(config.level, config.enable, config.disable)
    asked = _config.precision(config.precision)
    precision = runs.get("precision") or asked
    return optimize(
        loaded.model,
        tuple(loaded.args),
        loaded.kwargs,
        target=config.target,
        executors=runs.get("executors"),
        dynamic=_options.dynamic(config.dynamic),
        outputs=_options.outputs(config.outputs),
        level=chosen.level if runs.get("rewritten", True) else 0,
        enable=chosen.enable if runs.get("rewritten", True) else (),
        disable=chosen.disable,
        precision=precision,
        calibration=prepared.calibration if precision == asked else (),
        max_loss=config.max_loss,
        effort=effort,
        progress=None if progress is None else lambda name, done: progress(name, 0.6 * done),
    )


def _elsewhere(prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """The facts of a model for a GPU that is not here: its graph, and kernels compiled for it."""
    remarks, limits = Remarks(), gpu_limits(prepared.config.target)
    manager = PassManager([rule for rule in prepared.passes if rule.exact], remarks, limits)
    progress("rewrite", 0.2)
    outcome = manager.run(prepared.captured.clone(), prepared.inputs)
    progress("examine", 0.6)
    subject = Subject(
        captured=prepared.captured,
        inputs=prepared.inputs,
        graphs=[outcome.graph],
        outputs=evaluated(outcome.graph, prepared.inputs),
        rewrites=outcome.rewrites,
        remarks=remarks.rows,
        passes=prepared.passes,
        limits=limits,
        host=prepared.host,
    )
    return facts_of(subject)


def choice(prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """Which executors run a model, decided by measurement once, so that no later check depends on noise.

    Returns:
        ``executors`` in order of preference, None for the first that is right; whether the graph is
        ``rewritten``; and the ``precision`` that it runs in, null for the one that was asked for.
    """
    config = prepared.config
    insisted = _options.executors(config.executors)
    if insisted or config.elsewhere:
        return {"executors": list(insisted) if insisted else None, "rewritten": True, "precision": None}
    optimized = optimized_by(prepared, {}, "measured", progress)
    right = [candidate for candidate in optimized.report.candidates if not candidate.reason]
    if _as_fast(right[0], optimized.report.chosen):
        return {"executors": None, "rewritten": True, "precision": None}
    used = dict.fromkeys([*(step.executor for step in optimized.plan.steps), "eager"])
    return {
        "executors": list(used),
        "rewritten": optimized.report.chosen.name != BASELINE,
        "precision": optimized.report.precision,
    }


def _as_fast(preferred: Candidate, chosen: Candidate) -> bool:
    """True when the candidate that is preferred without measuring loses by no more than the spread."""
    if preferred is chosen or preferred.ms is None or chosen.ms is None:
        return True
    return preferred.ms - chosen.ms <= (preferred.spread_ms or 0.0) + (chosen.spread_ms or 0.0)


def _metric(name: str | None, original: torch.nn.Module, optimized: torch.nn.Module) -> dict[str, Any] | None:
    """The task metric of the model and of the optimized model."""
    if name is None:
        return None
    function = _spec.named(name)
    found: dict[str, Any] = {"name": name}
    for side, model in (("original", original), ("optimized", optimized)):
        try:
            with torch.no_grad():
                found[side] = float(function(model))
        except Exception as error:
            raise SpecError(
                f"{name} raises on the {side} model: {said(error)}",
                where=f"--metric {name}",
                hint="it is called with a model and returns a number",
            ) from error
        if not math.isfinite(found[side]):
            raise SpecError(f"{name} gives {found[side]} for the {side} model", where=f"--metric {name}")
    return found
