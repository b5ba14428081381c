"""Candidates: the ways to run a model, each compiled, checked against float64, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.compiler.reference import Reference, computed
from graphopt.compiler.remarks import Remarks
from graphopt.errors import GraphoptError, LoweringError, said
from graphopt.ir.graph import Graph
from graphopt.runtime import scheduler
from graphopt.runtime.measure import Timing, interleaved
from graphopt.runtime.partition import find_executors, partition
from graphopt.runtime.plan import Plan
from graphopt.runtime.profile import NodeTime, node_times
from graphopt.runtime.target import Target

_SECONDS = 4.0  # about how long the candidates are timed against each other


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
    if target.device.type == "cpu":
        ways.insert(0, ("ort", rewritten, ("ort", "eager")))
    else:
        ways.insert(0, ("cuda", rewritten, ("cuda", "eager")))
    candidates = []
    for name, graph, order in ways:
        try:
            plan = partition(graph, find_executors(order), target, remarks, effort)
            candidates.append(Candidate(name, graph, plan))
        except GraphoptError as error:
            candidates.append(Candidate(name, graph, None))
            candidates[-1].drop(error.message, remarks)
    return candidates


def choose(
    candidates: Sequence[Candidate],
    inputs: Sequence[torch.Tensor],
    reference: Reference,
    target: Target,
    remarks: Remarks,
    *,
    timed: bool,
) -> Choice:
    """Check every candidate against float64, time those that are right, and mark the fastest.

    Args:
        candidates: in order of preference, which decides when they are not timed.
        inputs: the example inputs: flat tensors.
        reference: the original's outputs, to hold theirs against.
        target: where they run.
        remarks: takes why a candidate was dropped.
        timed: measure; otherwise the first that is right is taken.

    Raises:
        LoweringError: no candidate gives the right answer.
    """
    for candidate in candidates:
        if candidate.plan is not None:
            _check(candidate, candidate.plan, inputs, reference, remarks)
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
