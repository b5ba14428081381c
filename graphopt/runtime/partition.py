"""The partitioner: which executor takes which part of a graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import fx

from graphopt.compiler.cost import milliseconds, node_cost, node_dtype
from graphopt.compiler.remarks import Remarks
from graphopt.errors import LoweringError, TargetError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, is_getitem, is_symbolic, op_name
from graphopt.runtime.executors import EXECUTORS, Executor
from graphopt.runtime.plan import Plan, Step, ends_of
from graphopt.runtime.region import Region, extract
from graphopt.runtime.target import Target


def find_executors(names: Sequence[str]) -> list[Executor]:
    """The executors of those names, in order of preference.

    Raises:
        TargetError: a name is unknown, or none was given.
    """
    unknown = [name for name in names if name not in EXECUTORS]
    if unknown or not names:
        what = f"unknown executor {unknown[0]!r}" if unknown else "no executor was named"
        raise TargetError(what, hint=f"the executors are: {', '.join(EXECUTORS)}")
    return [EXECUTORS[name] for name in names]


def partition(
    graph: Graph, executors: Sequence[Executor], target: Target, remarks: Remarks, effort: str = "measured"
) -> Plan:
    """Cut a graph into regions and compile each with the first executor that takes it.

    Nodes go to the first executor that supports them; neighbours of one executor form a region. A region that
    fails to compile goes to the next executor, with a remark.

    Args:
        graph: the rewritten graph; it stays as it is.
        executors: in order of preference.
        target: where it is to run.
        remarks: takes the reasons of what was refused.
        effort: "measured" lets executors time alternatives, "fast" does not.

    Raises:
        LoweringError: no executor takes a node, or all of them failed on a region.
    """
    owner = _assign(graph, executors, target, remarks)
    steps = []
    for index, (executor, nodes) in enumerate(_regions(graph, owner)):
        region = extract(graph, nodes, f"region{index}")
        fallbacks = executors[executors.index(executor) :]
        steps.append(_compile(region, fallbacks, target, remarks, effort))
        _analyse(steps[-1], target, remarks)
    outputs, constants = ends_of(graph)
    inputs = tuple(node.name for node in graph.placeholders)
    return Plan(target.device, inputs, outputs, constants, _with_lifetimes(steps, graph))


def _assign(
    graph: Graph, executors: Sequence[Executor], target: Target, remarks: Remarks
) -> dict[fx.Node, Executor]:
    owner: dict[fx.Node, Executor] = {}
    for node in graph.calls:
        if is_getitem(node):
            owner[node] = owner[node.all_input_nodes[0]]
            continue
        if is_symbolic(node) and graph.output not in node.users:
            continue  # sizes are computed where they are needed
        reasons = []
        for executor in executors:
            reason = _refusal(executor, node, graph, target)
            if reason is None:
                owner[node] = executor
                break
            reasons.append(f"{executor.name}: {reason}")
        else:
            raise LoweringError(
                f"no executor runs {op_name(node)} ({node.name}): {'; '.join(reasons)}",
                where=provenance.of(node).source or None,
                hint="let eager take the rest: executors=(..., 'eager')",
            )
        for reason in reasons:
            remarks.add("missed", "partition", node, reason)
    return owner


def _refusal(executor: Executor, node: fx.Node, graph: Graph, target: Target) -> str | None:
    if is_symbolic(node) and executor.name != "eager":
        return "the model returns this size: it is a number, not a tensor"
    return executor.supports(node, target)


def _regions(graph: Graph, owner: dict[fx.Node, Executor]) -> list[tuple[Executor, list[fx.Node]]]:
    """Group neighbours of one executor, so that no group waits for itself.

    A node's depth counts the changes of executor on the longest way to it. Nodes of one executor and one
    depth form a region: a path that leaves it comes back deeper.
    """
    depth: dict[fx.Node, int] = {}
    groups: dict[tuple[int, str], list[fx.Node]] = defaultdict(list)
    for node in graph.calls:
        below = [
            depth[source] + (source in owner and node in owner and owner[source] is not owner[node])
            for source in node.all_input_nodes
            if source in depth
        ]
        depth[node] = max(below, default=0)
        if node in owner:
            groups[depth[node], owner[node].name].append(node)
    return [(owner[nodes[0]], nodes) for _, nodes in sorted(groups.items(), key=lambda item: item[0][0])]


def _compile(
    region: Region, executors: Sequence[Executor], target: Target, remarks: Remarks, effort: str
) -> Step:
    problems = []
    for executor in executors:
        try:
            return Step(executor.name, region, executor.compile(region, target, effort))
        except LoweringError as error:
            problems.append(error)
            remarks.add("missed", "lower", region.graph.calls[0], f"{executor.name}: {error.message}")
    raise problems[-1]


def _analyse(step: Step, target: Target, remarks: Remarks) -> None:
    """Say what a step costs at least: the sum of its nodes' rooflines."""
    nodes = step.region.graph.calls
    costs = [node_cost(node) for node in nodes]
    flops, moved = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
    limits = target.limits
    limit = sum(milliseconds(node_cost(node), limits, node_dtype(node)) for node in nodes)
    reason = (
        f"{step.region.name}: {len(nodes)} nodes on {step.executor}; the roofline is {limit:.2f} ms a call"
    )
    remarks.add("analysis", "partition", nodes[0], reason, bytes=moved, flops=flops, ms=limit)


def _with_lifetimes(steps: Sequence[Step], graph: Graph) -> tuple[Step, ...]:
    """Note for each step which values die with it."""
    alive = {node.name for node in graph.output.all_input_nodes}
    placed: list[Step] = []
    for step in reversed(steps):
        frees = [name for name in (*step.region.reads, *step.region.writes) if name not in alive]
        alive.update(frees)
        placed.append(Step(step.executor, step.region, step.program, tuple(dict.fromkeys(frees))))
    return tuple(reversed(placed))
