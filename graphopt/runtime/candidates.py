"""Candidates: the ways to run a model, checked against float64, measured, and one of them chosen."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from graphopt.compiler.compare import Comparison
from graphopt.compiler.reference import Reference, computed
from graphopt.compiler.remarks import Remarks
from graphopt.errors import LoweringError, said
from graphopt.ir.graph import Graph, op_name
from graphopt.runtime import scheduler
from graphopt.runtime.executors._protocol import Resting
from graphopt.runtime.measure import HOPELESS, Timing, interleaved, warmed_up
from graphopt.runtime.plan import Plan
from graphopt.runtime.profile import NodeTime, node_times
from graphopt.runtime.rounds import clock_of, interleave
from graphopt.runtime.scheduling.arrange import arranged
from graphopt.runtime.target import Target

Turns = Sequence[Sequence[torch.Tensor]]

_SECONDS = 4.0  # about how long the candidates are timed against each other
_ROUNDS = 25  # at most, of one that has its turn alone


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
        deeper: makes the same way compiled for longer, which is worth it where this one is not hopeless.
        later: compiles it once the others have been timed, and hold no copies of the weights any more: a way
            of which the compiled form is another copy. None when that is done.
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
    deeper: Callable[[], Candidate] | None = None
    later: Callable[[], Candidate] | None = None

    @property
    def copies(self) -> bool:
        """Whether its programs hold copies of weights."""
        return self.plan is not None and any(isinstance(s.program, Resting) for s in self.plan.steps)

    def make(self) -> None:
        """Compile what was left for later."""
        if self.later is not None:
            made, self.later = self.later(), None
            self.plan, self.reason, self.judge = made.plan, made.reason, made.judge

    def rest(self, used: Collection[int] = ()) -> None:
        """Let its programs, but for those of these identities, let go of their copies of weights."""
        for step in self.plan.steps if self.plan is not None else ():
            if isinstance(step.program, Resting) and id(step.program) not in used:
                step.program.rest()

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

    @property
    def plan(self) -> Plan:
        """The chosen one's."""
        assert self.best.plan is not None
        return self.best.plan

    def plan_of(self, name: str) -> Plan | None:
        """The plan of a candidate; None where there is no such candidate, or it was dropped."""
        return next((candidate.plan for candidate in self.candidates if candidate.name == name), None)

    def rest_all_but(self, plan: Plan) -> None:
        """Let the programs of all other plans let go of their copies of weights."""
        plans = [plan] if plan.padded is None else [plan, plan.padded.plan]
        used = {id(step.program) for each in plans for step in each.steps}
        for candidate in self.candidates:
            candidate.rest(used)


def choose(
    candidates: Sequence[Candidate],
    inputs: Sequence[torch.Tensor],
    reference: Reference,
    target: Target,
    remarks: Remarks,
    turns: Turns | None = None,
    *,
    require_cuda_graph: bool = False,
) -> Choice:
    """Check every candidate against float64, time those that are right, and mark the fastest.

    Args:
        candidates: in order of preference, which decides when they are not timed.
        inputs: the example inputs: flat tensors.
        reference: the original's outputs, to hold theirs against.
        target: where they run.
        remarks: takes why a candidate was dropped.
        turns: inputs that calls are timed on, in turn; None to take the first that is right.
        require_cuda_graph: take only those that run in CUDA graphs as a whole.

    Raises:
        LoweringError: no candidate gives the right answer.
    """
    check = functools.partial(
        _right, inputs=inputs, reference=reference, remarks=remarks, require_cuda_graph=require_cuda_graph
    )
    waiting = [candidate for candidate in candidates if candidate.later is not None]
    right = check(candidates)
    if not right:
        for candidate in waiting:
            candidate.make()
        right, waiting = check(candidates), []
    if not right:
        reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates)
        raise LoweringError(f"no executor gives the right answer: {reasons}")
    best = right[0]
    if turns is not None:
        best = _fastest(right, turns, target)
        more = _deeper(right, best, remarks)
        candidates = [*candidates, *more]
        right += check(more)
        best = _fastest(right, turns, target) if more else best
        best = _in_turn(waiting, right, best, check, turns, target)
        _compare_mixed(right, best, remarks)
    best.chosen = True
    assert best.plan is not None
    best.node_times = node_times(best.plan, inputs)
    if turns is not None:
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


def _right(
    candidates: Sequence[Candidate],
    inputs: Sequence[torch.Tensor],
    reference: Reference,
    remarks: Remarks,
    require_cuda_graph: bool,
) -> list[Candidate]:
    """Those that give the right answer, in CUDA graphs where these are required; the others are dropped."""
    for candidate in candidates:
        if candidate.plan is not None:
            _check(candidate, candidate.plan, inputs, reference, remarks)
        if candidate.plan is not None and require_cuda_graph:
            outside = _outside(candidate.plan, remarks)
            if outside:
                candidate.drop(f"outside CUDA graphs are {outside}", remarks)
    return [candidate for candidate in candidates if candidate.plan is not None]


def _fastest(right: Sequence[Candidate], turns: Turns, target: Target) -> Candidate:
    """Time candidates against each other, and return the fastest by what a call takes undisturbed.

    Of one whose threads another process disturbs the median moves by a third, the lower quartile does not.
    """
    runs = [_runner(candidate.plan, turns) for candidate in right if candidate.plan is not None]
    timings = interleaved(runs, seconds=_SECONDS, device=target.device)
    for candidate, timing in zip(right, timings, strict=True):
        candidate.timing = timing
    return right[min(range(len(right)), key=lambda index: timings[index].lower_ms)]


def _in_turn(
    waiting: Sequence[Candidate],
    right: list[Candidate],
    best: Candidate,
    check: Callable[[Sequence[Candidate]], list[Candidate]],
    turns: Turns,
    target: Target,
) -> Candidate:
    """Compile and time those that wait, each while no other holds copies of weights; returns the fastest.

    So optimizing takes the memory of one copy, not of one for each way. What they are timed against is one
    that holds none, each in rounds of its own with it, and the ratios are compared.

    Args:
        waiting: those to be made.
        right: those that were; takes the waiting that are right.
        best: the fastest of them.
        check: drops those that are wrong, and returns the others.
        turns: inputs that calls are timed on in turn.
        target: where they run.
    """
    control = next((candidate for candidate in right if not candidate.copies), best)
    own: Timing | None = None
    for candidate in waiting:
        for other in right:
            other.rest()
        candidate.make()
        if not check([candidate]):
            continue
        right.append(candidate)
        assert best.timing is not None
        candidate.timing = _warmed_up(candidate, best.timing, turns, target)
        if candidate.timing.lower_ms > HOPELESS * best.timing.lower_ms:
            candidate.rest()
            continue
        if own is None:
            candidate.rest()
            own = _beside(control, best, turns, target)
            best.rest()
        found = _beside(control, candidate, turns, target)
        # as if they had been timed in the same rounds
        candidate.timing = found.times(best.timing.lower_ms / own.lower_ms)
        if found.lower_ms < own.lower_ms:
            best, own = candidate, found
        else:
            candidate.rest()
    return best


def _warmed_up(candidate: Candidate, best: Timing, turns: Turns, target: Target) -> Timing:
    return warmed_up(_runner(candidate.plan, turns), best.lower_ms, target.device)


def _beside(control: Candidate, candidate: Candidate, turns: Turns, target: Target) -> Timing:
    """What a candidate takes in rounds with another, in multiples of what that one takes undisturbed."""
    if candidate is control:
        return Timing(1.0, 1.0, 1.0, 0)
    plans = {"control": control.plan, "own": candidate.plan}
    runs = {name: _runner(plan, turns) for name, plan in plans.items() if plan is not None}
    clock = clock_of(target.device)
    times = interleave(runs, _ROUNDS, seconds=_SECONDS, clock=clock, warm_up=1)
    unit = Timing.of(times["control"]).lower_ms
    return Timing.of(times["own"]).times(1 / unit)


def _deeper(right: Sequence[Candidate], best: Candidate, remarks: Remarks) -> list[Candidate]:
    """Deeper compilations of those that one might make the fastest; of the others a remark."""
    made = []
    for candidate in right:
        if candidate.deeper is None or candidate.timing is None or best.timing is None:
            continue
        ratio = candidate.timing.median_ms / best.timing.median_ms
        if ratio <= HOPELESS:
            made.append(candidate.deeper())
        else:
            beside = f"it takes {ratio:.1f} times as long as {best.name}"
            remarks.add("analysis", "candidates", None, f"{candidate.name} is not tuned for longer: {beside}")
    return made


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


def _runner(plan: Plan | None, turns: Turns) -> Any:
    assert plan is not None
    given = itertools.cycle(turns)
    return lambda: scheduler.run(plan, next(given))


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
