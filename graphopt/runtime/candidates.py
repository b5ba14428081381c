"""Candidates: the ways to run a model, each compiled, checked against float64, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.compiler.cost import graph_milliseconds
from graphopt.compiler.reference import Reference, computed
from graphopt.compiler.remarks import Remarks
from graphopt.errors import GraphoptError, LoweringError, said
from graphopt.ir.graph import Graph, op_name
from graphopt.runtime import scheduler
from graphopt.runtime.measure import Timing, interleaved
from graphopt.runtime.partition import find_executors, partition
from graphopt.runtime.plan import Plan
from graphopt.runtime.profile import NodeTime, node_times
from graphopt.runtime.target import Target

_SECONDS = 4.0  # about how long the candidates are timed against each other
_WORTH_COMPILING_MS = 50.0  # a call's roofline on the CPU above which Inductor is tried


@dataclass
class Candidate:
    """One way to run the model.

    Args:
        name: executors and graph: "ort", "eager (captured graph)".
        graph: what it runs.
        plan: how; None when it failed to compile.
        reason: why it was dropped.
        error: largest error of its outputs relative to float64.
        timing: on the example inputs.
        node_times: a row a node, slowest first.
        chosen: it is what runs.
    """

    name: str
    graph: Graph
    plan: Plan | None
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None
    node_times: Sequence[NodeTime] = ()
    chosen: bool = field(default=False)

    def drop(self, reason: str, remarks: Remarks) -> None:
        """Take it out of the race, and say why."""
        self.plan, self.reason = None, reason
        remarks.add("missed", "candidates", None, f"{self.name} was dropped: {reason}")


@dataclass(frozen=True)
class Choice:
    """What was chosen among the candidates.

    Args:
        candidates: all of them, the chosen one marked.
    """

    candidates: Sequence[Candidate]

    @property
    def best(self) -> Candidate:
        """The chosen one."""
        return next(candidate for candidate in self.candidates if candidate.chosen)


def plan_candidates(
    captured: Graph,
    rewritten: Graph,
    executors: Sequence[str] | None,
    target: Target,
    remarks: Remarks,
    effort: str = "measured",
) -> list[Candidate]:
    """Compile every way to run the model.

    Args:
        captured: the graph as captured; running it in PyTorch is the peer that is always there.
        rewritten: the graph after the passes.
        executors: the only ones to use, in order of preference; None for every way there is.
        target: where.
        remarks: takes what was refused.
        effort: "measured" compiles every way, "fast" leaves out those that take long to compile.

    Raises:
        LoweringError: the executors insisted on cannot run the model.
        TargetError: an executor is unknown.
    """
    if executors is not None:
        plan = partition(rewritten, find_executors(executors), target, remarks, effort)
        return [Candidate(" + ".join(executors), rewritten, plan)]
    ways: list[tuple[str, Graph, tuple[str, ...]]] = [
        ("eager", rewritten, ("eager",)),
        ("eager (captured graph)", captured, ("eager",)),
    ]
    if effort == "measured" and _is_worth_compiling(rewritten, target):
        ways.insert(0, ("inductor", rewritten, ("inductor", "eager")))
    native = "ort" if target.device.type == "cpu" else "cuda"
    ways.insert(0, (native, rewritten, (native, "eager")))
    candidates = []
    for name, graph, order in ways:
        candidates.append(_compiled(name, graph, order, target, remarks, effort))
    return candidates


def plan_packed(
    packed: Graph, executors: Sequence[str] | None, target: Target, remarks: Remarks, effort: str = "measured"
) -> Candidate:
    """The way to run a model on real tokens only: on the executors insisted on, else on the fastest kind.

    Args:
        packed: the graph that packs tokens.
        executors: as for ``plan_candidates``.
        target: where.
        remarks: takes what was refused.
        effort: as for ``plan_candidates``.
    """
    native = "ort" if target.device.type == "cpu" else "cuda"
    order = (native, "eager") if executors is None else tuple(executors)
    name = native if executors is None else " + ".join(order)
    return _compiled(f"{name}, {PACKED}", packed, order, target, remarks, effort)


PACKED = "padding removed"


def _compiled(
    name: str, graph: Graph, order: Sequence[str], target: Target, remarks: Remarks, effort: str
) -> Candidate:
    candidate = Candidate(name, graph, None)
    try:
        plan = partition(graph, find_executors(order), target, remarks, effort)
    except GraphoptError as error:
        candidate.drop(error.message, remarks)
        return candidate
    if plan.steps and order[0] not in {step.executor for step in plan.steps}:
        candidate.drop(f"{order[0]} runs no part of it", remarks)
        return candidate
    candidate.plan = plan
    return candidate


def _is_worth_compiling(graph: Graph, target: Target) -> bool:
    """Whether Inductor is tried: on a GPU always, on the CPU where a call takes long.

    Its C++ takes a minute to compile for BERT-base on two cores, whatever is gained by it at a call.
    """
    return target.device.type != "cpu" or graph_milliseconds(graph, target.limits) >= _WORTH_COMPILING_MS


def choose(
    candidates: Sequence[Candidate],
    inputs: Sequence[torch.Tensor],
    reference: Reference,
    target: Target,
    remarks: Remarks,
    *,
    timed: bool,
    require_cuda_graph: bool = False,
) -> Choice:
    """Check every candidate against float64, time those that are right, and mark the fastest.

    Args:
        candidates: in order of preference, which decides when they are not timed.
        inputs: the example inputs: flat tensors.
        reference: the original's outputs, to hold theirs against.
        target: where they run.
        remarks: takes why a candidate was dropped.
        timed: measure; otherwise the first that is right is taken.
        require_cuda_graph: take only those that run in CUDA graphs as a whole.

    Raises:
        LoweringError: no candidate gives the right answer.
    """
    for candidate in candidates:
        if candidate.plan is not None:
            _check(candidate, candidate.plan, inputs, reference, remarks)
        if candidate.plan is not None and require_cuda_graph:
            outside = _outside(candidate.plan, remarks)
            if outside:
                candidate.drop(f"outside CUDA graphs are {outside}", remarks)
    right = [candidate for candidate in candidates if candidate.plan is not None]
    if not right:
        reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates)
        raise LoweringError(f"no executor gives the right answer: {reasons}")
    best = right[0]
    if timed:
        runs = [_runner(candidate.plan, inputs) for candidate in right if candidate.plan is not None]
        timings = interleaved(runs, seconds=_SECONDS, device=target.device)
        for candidate, timing in zip(right, timings, strict=True):
            candidate.timing = timing
        best = right[min(range(len(right)), key=lambda index: timings[index].median_ms)]
    best.chosen = True
    assert best.plan is not None
    best.node_times = node_times(best.plan, inputs)
    for step in best.plan.steps:
        for note in step.program.notes():
            remarks.add(note.kind, step.executor, note.node, note.reason)
    return Choice(candidates)


def _outside(plan: Plan, remarks: Remarks) -> str:
    """The nodes that no CUDA graph holds, and why; "" for none."""
    said_of = {row.node: row.reason for row in remarks.of_kind("missed") if row.pass_name == "partition"}
    found = []
    for step in plan.outside_cuda_graphs():
        whole = next((note.reason for note in step.program.notes() if note.kind == "missed"), "")
        for node in step.region.graph.calls:
            reason = whole or said_of.get(node.name) or f"{step.executor} makes no CUDA graph"
            found.append(f"{op_name(node)} ({node.name}: {reason})")
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


_NAMED = 8  # nodes in an error's message


def _runner(plan: Plan, inputs: Sequence[torch.Tensor]) -> Any:
    return lambda: scheduler.run(plan, inputs)


def _check(
    candidate: Candidate,
    plan: Plan,
    inputs: Sequence[torch.Tensor],
    reference: Reference,
    remarks: Remarks,
) -> None:
    try:
        after = scheduler.run(plan, inputs)
    except Exception as error:
        candidate.drop(f"it fails to run: {said(error)}", remarks)
        return
    found = reference.compare(computed(candidate.graph, after))
    candidate.error = found.error_after
    if not found.ok:
        candidate.drop(found.reason, remarks)
