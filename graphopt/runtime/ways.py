"""The ways to run a model on a target: graphs and executors, compiled into candidates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from graphopt.compiler.cost import graph_milliseconds
from graphopt.compiler.remarks import Remarks
from graphopt.errors import GraphoptError, LoweringError, TargetError, said
from graphopt.ir.graph import Graph
from graphopt.kernels.block_quantized_linear import OP as BLOCK_QUANTIZED_LINEAR
from graphopt.kernels.dynamic_quantized_linear import OP as DYNAMIC_QUANTIZED_LINEAR
from graphopt.kernels.float8_linear import OP as FLOAT8_LINEAR
from graphopt.kernels.quantized_conv import OP as QUANTIZED_CONV
from graphopt.kernels.quantized_linear import OP as QUANTIZED_LINEAR
from graphopt.kernels.static_quantized_linear import OP as STATIC_QUANTIZED_LINEAR
from graphopt.runtime.across import plan_across
from graphopt.runtime.candidates import Candidate, Judge
from graphopt.runtime.executors import EXECUTORS, Executor, absent, besides, hinted, of_codes
from graphopt.runtime.partition import Cut, compiled, cut, find_executors, merged, partition
from graphopt.runtime.target import Target

_WORTH_COMPILING_MS = 50.0  # a call's roofline on the CPU above which Inductor is tried


def plan_candidates(
    captured: Graph,
    rewritten: Graph,
    executors: Sequence[str] | None,
    target: Target,
    remarks: Remarks,
    effort: str = "measured",
) -> list[Candidate]:
    """Every way to run the model, compiled, but for those that are left for later (see ``Candidate``).

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
    across = _across(rewritten, executors, target, remarks, effort) if target.beside else []
    timed = effort == "measured"  # otherwise the first is taken, and costs have told whether several gain
    if executors is not None:
        plan = partition(rewritten, _present(executors, target, remarks), target, remarks, effort)
        alone = [Candidate(" + ".join(executors), rewritten, plan)]
        return [*alone, *across] if timed else [*across, *alone]
    native = _native_name(target)
    compile_too = timed and _is_worth_compiling(rewritten, target)
    candidates = _native(native, rewritten, target, remarks, effort, compile_too)
    other = besides(target) if timed else None
    if other is not None and _is_here(other, target, remarks):
        made = functools.partial(_way, other, rewritten, (other, "eager"), target, remarks, effort)
        candidates.append(Candidate(other, rewritten, None, later=made))
    if compile_too:
        candidates.append(_on_inductor(rewritten, target, remarks, effort))
    for name, graph in (("eager", rewritten), ("eager (captured graph)", captured)):
        candidates.append(_way(name, graph, ("eager",), target, remarks, effort))
    return [*candidates, *across] if timed else [*across, *candidates]


def _on_inductor(graph: Graph, target: Target, remarks: Remarks, effort: str) -> Candidate:
    """The way to run it on Inductor: on a GPU without its search for kernels first, which takes minutes.

    On a CPU its packed weights are a copy of the model's: it is compiled once all others have been timed.
    """
    if target.device.type == "cpu":
        made = functools.partial(_way, "inductor", graph, ("inductor", "eager"), target, remarks, effort)
        return Candidate("inductor", graph, None, later=made)
    found = merged(cut(graph, find_executors(("inductor", "eager")), target, remarks), target, effort)
    candidate = _compiled("inductor", found, target, remarks, "fast")
    candidate.deeper = lambda: _compiled("inductor (max-autotune)", found, target, remarks, effort)
    return candidate


def _native_name(target: Target) -> str:
    """The executor that is made for a device."""
    return "ort" if target.device.type == "cpu" else "cuda"


def _across(
    graph: Graph, executors: Sequence[str] | None, target: Target, remarks: Remarks, effort: str
) -> list[Candidate]:
    """The way to run a graph on all of a target's devices."""

    def order(each: Target) -> list[Executor]:
        return find_executors(executors or (_native_name(each), "eager"))

    candidate = Candidate("several devices", graph, None)
    try:
        candidate.plan = plan_across(graph, target, order, remarks, effort)
    except (GraphoptError, RuntimeError) as error:  # of a device whose memory is too small, too
        candidate.drop(error.message if isinstance(error, GraphoptError) else said(error), remarks)
    return [candidate]


def narrowed_candidates(
    graph: Graph,
    precision: str,
    judge: Callable[[], Judge],
    executors: Sequence[str] | None,
    target: Target,
    remarks: Remarks,
    effort: str = "measured",
) -> list[Candidate]:
    """The same for a model whose numbers were made narrower; those that fail are dropped.

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

    def way(name: str, chain: Sequence[Executor], effort: str) -> Candidate:
        candidate = Candidate(f"{name} ({precision})", graph, None, judge=judge())
        try:
            candidate.plan = partition(graph, chain, target, remarks, effort)
        except GraphoptError as error:
            candidate.drop(error.message, remarks)
        return candidate

    if executors is not None:
        return [way(" + ".join(executors), find_executors(executors), effort)]
    ways = _narrow_ways(graph, target, effort)
    on_cpu, timed = target.device.type == "cpu", effort == "measured"
    candidates = []
    for name, chain in ways.items():
        if timed and on_cpu and chain[0].name in _HOLD_A_COPY:
            later = functools.partial(way, name, chain, effort)
            candidates.append(Candidate(f"{name} ({precision})", graph, None, later=later))
            continue
        in_two_steps = name == "inductor" and not on_cpu
        candidate = way(name, chain, "fast" if in_two_steps else effort)
        if in_two_steps and timed:
            candidate.deeper = functools.partial(way, f"{name}, max-autotune", chain, effort)
        candidates.append(candidate)
    return candidates


_HOLD_A_COPY = ("inductor", "openvino", "ort")  # of the weights, packed
_CODES = {
    op.overload
    for op in (
        BLOCK_QUANTIZED_LINEAR,
        DYNAMIC_QUANTIZED_LINEAR,
        QUANTIZED_CONV,
        QUANTIZED_LINEAR,
        STATIC_QUANTIZED_LINEAR,
    )
}


def _narrow_ways(graph: Graph, target: Target, effort: str) -> Mapping[str, Sequence[Executor]]:
    """The ways to run a graph of narrower numbers, by name."""
    if target.device.type != "cpu":
        # Of float8 Inductor sees the reference, which multiplies in float32.
        whole = any(node.target is FLOAT8_LINEAR.overload for node in graph.calls)
        between = [] if whole else [("inductor", "eager")]
        return {chain[0]: find_executors(chain) for chain in (("cuda", "eager"), *between, ("eager",))}
    names = ["onednn", "ort", "eager"]
    if effort == "measured" and _is_worth_compiling(graph, target):
        names.insert(1, "inductor")
    ways: dict[str, Sequence[Executor]] = {name: find_executors((name,)) for name in names}
    if effort == "measured" and any(node.target in _CODES for node in graph.calls):
        for one in of_codes(target):
            beside = "" if one.precision == "f32" else f", {one.precision} beside it"
            ways[f"{one.name}{beside}"] = [one]
    return ways


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
) -> list[Candidate]:
    """The ways to run a model on real tokens only: on the executors insisted on, else on those made for it.

    Where these cannot run it, they are dropped: the plans that keep the padding serve.

    Args:
        packed: the graph that packs tokens.
        executors: as for ``plan_candidates``.
        target: where.
        remarks: takes what was refused.
        effort: as for ``plan_candidates``.
    """

    def way(order: Sequence[str], name: str) -> Candidate:
        try:
            return _way(f"{name}, {PACKED}", packed, order, target, remarks, effort)
        except LoweringError as error:  # no executor takes a node
            candidate = Candidate(f"{name}, {PACKED}", packed, None)
            candidate.drop(error.message, remarks)
            return candidate

    if executors is not None:
        return [way(tuple(executors), " + ".join(executors))]
    native = _native_name(target)
    found = [way((native, "eager"), native)]
    other = besides(target) if effort == "measured" and target.device.type == "cpu" else None
    if other is not None and absent(EXECUTORS[other], target) is None:
        later = functools.partial(way, (other, "eager"), other)
        found.append(Candidate(f"{other}, {PACKED}", packed, None, later=later))
    return found


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
    if compile_too and len(found.groups) > 1:
        mixed = (native, "inductor", "eager")
        candidates.append(_way(f"{native} + inductor", graph, mixed, target, Remarks(), effort))
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
