"""The way of a model, from module to optimized module: this page is the whole pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import graphopt.kernels  # noqa: F401  (registers the ops)
from graphopt.capture.export import capture_any
from graphopt.capture.inputs import Dynamic
from graphopt.capture.outputs import Outputs, select
from graphopt.compiler.contract import own_outputs
from graphopt.compiler.evaluate import outputs as evaluated
from graphopt.compiler.lossy import Budget, LossyManager, Metric, relative_distance
from graphopt.compiler.manager import Outcome, PassManager
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.reference import Reference, computed, output_reference
from graphopt.compiler.remarks import Remarks, Rewrite
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import InputError, TargetError
from graphopt.ir.graph import Graph
from graphopt.observe.memory import memory_of
from graphopt.observe.report import BASELINE, Candidate, Report
from graphopt.observe.snapshot import snapshot, versions
from graphopt.optimized_model import OnMismatch, OptimizedModel
from graphopt.packing import Padding, remove_padding, with_padded, zero_padding
from graphopt.passes.default import pipeline
from graphopt.precision import calibration_calls, default_max_loss, narrowed, require_possible
from graphopt.precision import passes_of as precision_passes
from graphopt.runtime import candidates as runtime
from graphopt.runtime.candidates import Choice, choose
from graphopt.runtime.changing import changing
from graphopt.runtime.target import Target
from graphopt.runtime.ways import plan_candidates, plan_packed

Progress = Callable[[str, float], None]


def optimize(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Target = "auto",
    executors: Sequence[str] | None = None,
    dynamic: Dynamic = None,
    outputs: Outputs = None,
    level: int = 2,
    enable: Iterable[str] = (),
    disable: Collection[str] = (),
    padding: Padding = "keep",
    precision: str = "exact",
    max_loss: float | None = None,
    metric: Metric | None = None,
    calibration: Iterable[tuple[Any, ...] | Mapping[str, Any]] = (),
    effort: str = "measured",
    require_cuda_graph: bool = False,
    on_mismatch: OnMismatch = "error",
    progress: Progress | None = None,
) -> OptimizedModel:
    """Make a model faster, and prove that it is still the same model.

    Args:
        model: an ``nn.Module`` in evaluation mode, or an exported program with example inputs.
        args: example positional inputs, as for ``torch.export.export``.
        kwargs: example keyword inputs.
        target: ``"auto"`` (where the model is), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a Target.
        executors: names in order of preference; they then run the model, whatever is faster. None measures.
        dynamic: True, or names of dynamic dimensions: ``{"input_ids": {0: "batch", 1: "seq"}}``.
        outputs: keep only these: names, or names with ``"last"`` for the last position alone:
            ``{"logits": "last"}``. What is not kept is None in the output, and what only it needs is not
            computed.
        level: 0 rewrites nothing, 2 is the default, 3 adds what is rarely worth its time.
        enable: passes to run although their level is higher, by exact name; those that lose something run
            only so, and only with ``max_loss``.
        disable: passes to leave out, by exact name.
        precision: also tries the model in narrower numbers, as far as ``max_loss`` allows, and takes that
            where it is faster; ``"exact"`` does not. ``"bf16"`` and ``"fp16"``; on a GPU also ``"fp8"`` (both
            factors of projections, a scale a row); on a CPU also ``"int8"`` (inputs of products are quantized
            as they come, row by row), ``"int8-static"`` (by ranges that are observed beforehand; convolutions
            too), and for models that read each weight for few tokens ``"int8-weights"`` and ``"int4"``
            (weights alone, in blocks of 32).
        padding: what outputs hold at padded positions, which the mask of attention tells: ``"keep"``, what
            the original computes there; ``"remove"``, zeros. What no output needs is not computed for padded
            positions in either case, where that is the fastest on the example inputs: give some that are
            padded as later ones will be.
        max_loss: the most that lossy passes may lose on the example inputs, as ``metric`` has it. With a
            ``precision`` and no ``metric`` it has a default: 0.03 for bf16, 0.01 for fp16, 0.06 for fp8, 0.04
            for int8 and int8-static, 0.02 for int8-weights, 0.1 for int4.
        metric: called with the original's flat outputs and the rewritten model's, returns the loss; the
            largest relative distance in the 2-norm by default.
        calibration: with ``precision="int8-static"``: further inputs, each a tuple of positional or a mapping
            of keyword arguments. The steps of 8 bits reach from the smallest to the largest value that they
            and the example give at each place, and cut off what lies beyond in later calls: give some that
            are as later ones will be.
        effort: ``"measured"`` times the candidates on the example inputs; ``"fast"`` takes the first that is
            right.
        require_cuda_graph: fail rather than run a node outside a CUDA graph; for a target that is a GPU.
        on_mismatch: what a call with other dtypes, ranks, devices or sizes does: ``"error"``, or
            ``"fallback"``, which runs the original and counts it.
        progress: called with (what is being done, fraction done).

    Returns:
        A module that is called like ``model`` and returns the same type.

    Raises:
        InputError: example inputs are missing, or on another device than the model; an option is unknown.
        CaptureError: the model cannot be captured.
        TargetError: the target or an executor is unknown or not there.
        PassError: a pass is unknown.
        LoweringError: the executors that were insisted on cannot run the model, or a node is outside a CUDA
            graph and ``require_cuda_graph`` is set.
    """
    _require_known(effort=effort, on_mismatch=on_mismatch, padding=padding)
    clock = _Clock(progress)
    passes = pipeline(level, (*enable, *precision_passes(precision)), disable)
    budget = _budget(passes, default_max_loss(precision, metric) if max_loss is None else max_loss, metric)
    with clock.stage("capture", 0.0):
        captured, inputs = capture_any(model, args, kwargs, dynamic=dynamic)
        original = model if isinstance(model, torch.nn.Module) else model.module()
        ops_before = captured.op_counts()
        selection = select(captured, outputs)
    where = Target.of(target, _home(original, inputs))
    _require_graphs(require_cuda_graph, where)
    require_possible(precision, where)
    remarks, calls = Remarks(), calibration_calls(captured, original.forward, calibration, precision)
    with clock.stage("rewrite", 0.2):
        base, lossy, loss = _within(budget, captured, passes, inputs, remarks)
        older = len(remarks.rows)
        manager = PassManager(_exact(passes), remarks, where.limits, on_pass=clock.within(0.2, 0.4))
        outcome = manager.run(base.clone(), inputs)
    with clock.stage("verify", 0.4):
        if padding == "remove":
            zero_padding((base, outcome.graph), remarks)
        reference = output_reference(base, inputs, MODEL_FLOOR_ULPS)
        outcome = _verified(outcome, base, inputs, reference, manager, older)
        own_outputs(outcome.graph, captured, remarks)
    with clock.stage("narrow", 0.45):
        before = captured if padding == "keep" else base
        narrow = narrowed(outcome.graph, passes, precision, budget, inputs, before, where, calls)
        packed = remove_padding(outcome.graph, inputs, remarks, where.limits, disable)
    with clock.stage("lower", 0.5):
        padded = plan_candidates(base, outcome.graph, executors, where, remarks, effort)
        real = plan_packed(packed.graph, executors, where, remarks, effort) if packed is not None else []
        narrower = narrow.candidates(reference, executors, where, effort) if narrow is not None else []
        candidates = [*narrower, *real, *padded]
    with clock.stage("measure", 0.8):
        timed, mask = effort == "measured", packed.mask if packed is not None else None
        turns = changing(captured, inputs, where, mask) if timed else None
        chosen = choose(
            candidates, inputs, reference, where, remarks, turns, require_cuda_graph=require_cuda_graph
        )
        plan = chosen.plan
        if packed is not None and chosen.best.graph is packed.graph:
            plan = with_padded(chosen.best, padded, packed, inputs, timed=timed)
            outcome.rewrites += packed.rewrites
        memory = memory_of(captured, plan, chosen.plan_of(BASELINE), inputs)
        chosen.rest_all_but(plan)
    outcome.rewrites[:0] = lossy
    if narrow is not None:
        loss = narrow.settle(chosen.best, outcome, loss, remarks)
    report = _report(original, captured, outcome, remarks, chosen, clock, ops_before, loss, memory)
    narrowly = narrow is not None and narrow.runs(chosen.best)
    report.precision = precision if narrowly else report.precision
    exported = chosen.best.graph if narrowly else outcome.graph
    return OptimizedModel(captured, exported, plan, report, original, on_mismatch, selection)


_KNOWN = {
    "effort": ("measured", "fast"),
    "on_mismatch": ("error", "fallback"),
    "padding": ("keep", "remove"),
}


def _require_known(**given: str) -> None:
    for name, value in given.items():
        if value not in _KNOWN[name]:
            raise InputError(f"{name}={value!r} is unknown", hint=f"one of: {', '.join(_KNOWN[name])}")


def _exact(passes: Sequence[Pass]) -> list[Pass]:
    return [rule for rule in passes if rule.exact]


def _require_graphs(required: bool, where: Target) -> None:
    if required and where.device.type != "cuda":
        raise TargetError(
            f"require_cuda_graph=True, but the target is {where}", hint="move the model to a GPU"
        )


def _budget(passes: Sequence[Pass], max_loss: float | None, metric: Metric | None) -> Budget | None:
    """What lossy passes may lose; None when none of them runs."""
    lossy = [rule.name for rule in passes if not rule.exact]
    if lossy and max_loss is None:
        raise InputError(
            f"{', '.join(lossy)} may change the results, and max_loss does not say by how much",
            hint="max_loss=0.01 allows a relative distance of 1 % on the example inputs",
        )
    if max_loss is None or not lossy:
        return None
    if not max_loss >= 0:
        raise InputError(f"max_loss={max_loss} is no loss", hint="0 or above")
    return Budget(float(max_loss), metric or relative_distance)


def _within(
    budget: Budget | None,
    captured: Graph,
    passes: Sequence[Pass],
    inputs: Sequence[torch.Tensor],
    remarks: Remarks,
) -> tuple[Graph, list[Rewrite], float | None]:
    """What all below is compared with: as captured, but for what lossy passes took away; and the loss."""
    rules = [rule for rule in passes if not rule.exact and rule.kind != "cast"]
    if budget is None or not rules:
        return captured, [], None
    base = captured.clone()
    manager = LossyManager(rules, remarks, budget)
    outcome, loss = manager.run(base, inputs)
    return base, outcome.rewrites, loss


def _verified(
    outcome: Outcome,
    captured: Graph,
    inputs: Sequence[torch.Tensor],
    reference: Reference,
    manager: PassManager,
    older: int,
) -> Outcome:
    """The rewritten model, compared end to end: verdicts shared between layers are not taken on trust.

    Should it differ, every site is verified on its own; should it differ still, nothing is rewritten. The
    remarks but for the first ``older``, which are older, are taken back then.
    """
    for attempt in (outcome, None):
        if attempt is None:
            manager.remarks.rollback(older)
            manager.remarks.add("analysis", "verify", None, "the whole differs: every site is verified again")
            manager.share = False
            attempt = manager.run(captured.clone(), inputs)
        after = evaluated(attempt.graph, inputs)
        found = reference.compare(computed(captured, after))
        if found.ok:
            return attempt
    manager.remarks.rollback(older)
    manager.remarks.add("missed", "verify", None, f"all rewrites were reverted: end to end, {found.reason}")
    return Outcome(captured.clone(), [])


def _report(
    model: torch.nn.Module,
    captured: Graph,
    outcome: Outcome,
    remarks: Remarks,
    chosen: Choice,
    clock: _Clock,
    ops_before: dict[str, int],
    loss: float | None,
    memory: dict[str, Any],
) -> Report:
    best = chosen.best
    assert best.plan is not None
    return Report(
        model=type(model).__name__,
        ops_before=ops_before,
        ops_after=best.graph.op_counts(),
        rewrites=outcome.rewrites,
        remarks=remarks.rows,
        candidates=[_row(candidate) for candidate in chosen.candidates],
        plan=best.plan.rows(),
        node_times=best.node_times,
        memory=memory,
        versions=versions(),
        seconds=clock.seconds,
        graph_before=snapshot(captured),
        graph_after=snapshot(best.graph),
        loss=loss,
    )


def _row(found: runtime.Candidate) -> Candidate:
    timing = found.timing
    ms, spread = (timing.median_ms, timing.spread_ms) if timing else (None, None)
    return Candidate(found.name, ms, spread, found.error, found.chosen, found.reason)


def _home(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> torch.device:
    tensors = (*model.parameters(), *model.buffers(), *inputs)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


class _Clock:
    """Times the stages and tells how far the work is."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, done: float) -> Iterator[None]:
        """One stage, which starts when ``done`` of the work is done."""
        self._tell(name, done)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def within(self, start: float, end: float) -> Callable[[str, int, int], None]:
        """A callback for steps between two fractions of the work."""
        return lambda name, index, count: self._tell(name, start + (end - start) * index / count)

    def _tell(self, name: str, done: float) -> None:
        if self._progress is not None:
            self._progress(name, done)
