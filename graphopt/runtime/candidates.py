"""Candidates: the ways to run a model, each compiled, checked against float64, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from graphopt.compiler.compare import Comparison
from graphopt.compiler.cost import graph_milliseconds
from graphopt.compiler.reference import Reference, computed
from graphopt.compiler.remarks import Remarks
from graphopt.errors import GraphoptError, LoweringError, TargetError, said
from graphopt.ir.graph import Graph, op_name
from graphopt.runtime import scheduler
from graphopt.runtime.executors import EXECUTORS, Executor, absent, besides, hinted
from graphopt.runtime.measure import Timing, interleaved
from graphopt.runtime.partition import Cut, compiled, cut, find_executors, merged, partition
from graphopt.runtime.plan import Plan
from graphopt.runtime.profile import NodeTime, node_times
from graphopt.runtime.scheduling.arrange import arranged
from graphopt.runtime.target import Target

_SECONDS = 4.0  # about how long the candidates are timed against each other
_WORTH_COMPILING_MS = 50.0  # a call's roofline on the CPU above which Inductor is tried


class Judge(Protocol):
    """What a candidate's outputs are held against."""

    def compare(self, after: Sequence[Any]) -> Comparison:
        """Judge what it computes of what the graph returns."""


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
        judge: what its outputs are held against; None for what all others are.
    """

    name: str
    graph: Graph
    plan: Plan | None
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None
    node_times: Sequence[NodeTime] = ()
    chosen: bool = field(default=False)
    judge: Judge | None = None

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

    def plan_of(self, name: str) -> Plan | None:
        """The plan of a candidate; None where there is no such candidate, or it was dropped."""
        return next((candidate.plan for candidate in self.candidates if candidate.name == name), None)


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
        TargetError: an executor is unknown, or what it runs on is not there.
    """
    if executors is not None:
        plan = partition(rewritten, _present(executors, target, remarks), target, remarks, effort)
        return [Candidate(" + ".join(executors), rewritten, plan)]
    native = "ort" if target.device.type == "cpu" else "cuda"
    compile_too = effort == "measured" and _is_worth_compiling(rewritten, target)
    candidates = _native(native, rewritten, target, remarks, effort, compile_too)
    other = besides(target) if effort == "measured" else None
    if other is not None and _is_here(other, target, remarks):
        candidates.append(_way(other, rewritten, (other, "eager"), target, remarks, effort))
    if compile_too:
        candidates.append(_way("inductor", rewritten, ("inductor", "eager"), target, remarks, effort))
    for name, graph in (("eager", rewritten), ("eager (captured graph)", captured)):
        candidates.append(_way(name, graph, ("eager",), target, remarks, effort))
    return candidates


def narrowed_candidates(
    graph: Graph,
    precision: str,
    judge: Callable[[], Judge],
    executors: Sequence[str] | None,
    target: Target,
    remarks: Remarks,
    effort: str = "measured",
) -> list[Candidate]:
    """Compile every way to run a model whose numbers were made narrower; those that fail are dropped.

    Each executor but the last takes all of it or nothing: crossing from one to another between two products
    would cost what the narrow one gains.

    Args:
        graph: the rewritten graph.
        precision: its name, for those of the candidates.
        judge: makes what the outputs of one are held against.
        executors: the only ones to use, in order of preference; None for every way there is.
        target: where.
        remarks: takes what was refused.
        effort: as for ``plan_candidates``.
    """
    if executors is not None:
        ways: list[tuple[str, ...]] = [tuple(executors)]
    elif target.device.type == "cpu":
        ways = [("onednn",), ("ort",), ("eager",)]
        if effort == "measured" and _is_worth_compiling(graph, target):
            ways.insert(1, ("inductor",))
    else:
        ways = [("cuda", "eager"), ("inductor", "eager"), ("eager",)]
    candidates = []
    for order in ways:
        name = " + ".join(order) if executors is not None else order[0]
        candidate = Candidate(f"{name} ({precision})", graph, None, judge=judge())
        candidates.append(candidate)
        try:
            candidate.plan = partition(graph, find_executors(order), target, remarks, effort)
        except GraphoptError as error:
            candidate.drop(error.message, remarks)
    return candidates


def hinted_candidates(
    graph: Graph,
    precision: str,
    judge: Judge,
    executors: Sequence[str] | None,
    target: Target,
    remarks: Remarks,
    effort: str = "measured",
) -> list[Candidate]:
    """The way to run an exact graph on an executor that narrows it by itself; none where there is none.

    Args:
        graph: the exact graph.
        precision: that the executor is told to compute in.
        judge: what its outputs are held against.
        executors: as for ``narrowed_candidates``; it must be among them.
        target: where.
        remarks: takes what was refused.
        effort: "fast" takes it only where it is insisted on.
    """
    by_itself = hinted(precision, target)
    order = executors or ([by_itself.name] if by_itself and effort == "measured" else [])
    if by_itself is None or by_itself.name not in order:
        return []
    chain = [by_itself if name == by_itself.name else EXECUTORS[name] for name in order]
    candidate = Candidate(f"{' + '.join(order)} ({precision}, by a hint)", graph, None, judge=judge)
    try:
        candidate.plan = partition(graph, chain, target, remarks, effort)
    except GraphoptError as error:
        candidate.drop(error.message, remarks)
    return [candidate]


PACKED = "padding removed"


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
    return _way(f"{name}, {PACKED}", packed, order, target, remarks, effort)


def _native(
    native: str, graph: Graph, target: Target, remarks: Remarks, effort: str, compile_too: bool
) -> list[Candidate]:
    """The executor that is made for the device; where it does not take all, every way to mix it with others.

    The regions are merged by the cost model. When there is time to measure, the regions as they were before,
    and the rest on Inductor instead of PyTorch, are measured beside them.
    """
    found = cut(graph, find_executors((native, "eager")), target, remarks)
    weighed = merged(found, target, effort)
    candidates = [_compiled(native, weighed, target, remarks, effort)]
    if effort == "measured" and weighed is not found:
        name = f"{native} (all that it takes)"
        candidates.append(_compiled(name, found, target, remarks, effort))
    if native == "ort" and compile_too and len(found.groups) > 1:
        mixed = ("ort", "inductor", "eager")
        candidates.append(_way("ort + inductor", graph, mixed, target, Remarks(), effort))
    return candidates


def _way(
    name: str, graph: Graph, order: Sequence[str], target: Target, remarks: Remarks, effort: str
) -> Candidate:
    found = merged(cut(graph, find_executors(order), target, remarks), target, effort)
    return _compiled(name, found, target, remarks, effort)


def _compiled(name: str, found: Cut, target: Target, remarks: Remarks, effort: str) -> Candidate:
    candidate = Candidate(name, found.graph, None)
    first = found.executors[0].name
    try:
        plan = compiled(found, target, remarks, effort)
    except GraphoptError as error:
        candidate.drop(error.message, remarks)
        return candidate
    if plan.steps and first not in {step.executor for step in plan.steps}:
        able = any(refusals[first] is None for refusals in found.refusals)
        why = ": handing over to it costs more than it gains" if able else ""
        candidate.drop(f"{first} runs no part of it{why}", remarks)
    else:
        candidate.plan = plan
    return candidate


def _present(names: Sequence[str], target: Target, remarks: Remarks) -> list[Executor]:
    """The executors of those names but for those that are not there, each with a remark.

    Raises:
        TargetError: an executor is unknown, or none of them is there.
    """
    found = find_executors(names)
    reasons = {executor.name: absent(executor, target) for executor in found}
    here = [executor for executor in found if reasons[executor.name] is None]
    if not here:
        what = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise TargetError(
            f"no executor that was asked for runs on {target}: {what}",
            hint="leave executors= out, and the measurement chooses among those that are there",
        )
    for executor in found:
        if executor not in here:
            _remark_absent(executor.name, reasons[executor.name] or "", remarks)
    return here


def _is_here(name: str, target: Target, remarks: Remarks) -> bool:
    reason = absent(EXECUTORS[name], target)
    if reason is not None:
        _remark_absent(name, reason, remarks)
    return reason is None


def _remark_absent(name: str, reason: str, remarks: Remarks) -> None:
    remarks.add("missed", "candidates", None, f"{name} is no candidate: {reason}")


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
        _compare_mixed(right, best, remarks)
    best.chosen = True
    assert best.plan is not None
    best.node_times = node_times(best.plan, inputs)
    if timed:
        best.plan = arranged(
            best.plan,
            inputs,
            remarks,
            lambda after: (best.judge or reference).compare(computed(best.graph, after)).ok,
        )
    for step in best.plan.steps:
        for note in step.program.notes():
            remarks.add(note.kind, step.executor, note.node, note.reason)
    return Choice(candidates)


def _compare_mixed(candidates: Sequence[Candidate], best: Candidate, remarks: Remarks) -> None:
    """Say what was measured of every way to mix executors, beside what was chosen."""
    for candidate in candidates:
        steps = candidate.plan.steps if candidate.plan is not None else ()
        if len(steps) < 2 or candidate.timing is None or best.timing is None:
            continue
        counts = Counter(step.executor for step in steps)
        mix = " and ".join(f"{count} on {name}" for name, count in counts.items())
        took = f"{candidate.name}: {len(steps)} regions, {mix}, take {candidate.timing.median_ms:.3f} ms"
        beside = "the fastest" if candidate is best else f"{best.name} takes {best.timing.median_ms:.3f} ms"
        remarks.add("analysis", "candidates", None, f"{took}; {beside}")


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
    found = (candidate.judge or reference).compare(computed(candidate.graph, after))
    candidate.error = found.error_after
    if not found.ok:
        candidate.drop(found.reason, remarks)
