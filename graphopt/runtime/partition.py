"""The partitioner: which executor takes which part of a graph."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphopt.compiler.cost import milliseconds, node_cost, node_dtype
from graphopt.compiler.remarks import Remarks
from graphopt.errors import LoweringError, TargetError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, is_symbolic, op_name, tensor_bytes
from graphopt.runtime.crossing import Costs
from graphopt.runtime.executors import EXECUTORS, Executor
from graphopt.runtime.plan import Plan, Step, ends_of
from graphopt.runtime.region import Region, extract
from graphopt.runtime.regions import Group, Unit, cheapest, take_turns, whole_units
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


Refusals = dict[str, str | None]  # by executor, in order of preference, why it does not take a node


@dataclass(frozen=True)
class Cut:
    """A graph cut into regions that are not compiled yet.

    Args:
        graph: the graph.
        executors: in order of preference.
        units: its calls.
        refusals: by unit, who does not take it, and why.
        groups: the regions in order: who is to run each, and its units.
    """

    graph: Graph
    executors: Sequence[Executor]
    units: Sequence[Unit]
    refusals: Sequence[Refusals]
    groups: Sequence[Group]


def partition(
    graph: Graph, executors: Sequence[Executor], target: Target, remarks: Remarks, effort: str = "measured"
) -> Plan:
    """Cut a graph by preference alone, and compile the regions; see ``cut`` and ``compiled``."""
    return compiled(cut(graph, executors, target, remarks), target, remarks, effort)


def cut(graph: Graph, executors: Sequence[Executor], target: Target, remarks: Remarks) -> Cut:
    """Give every node to the first executor that takes it, in as few regions as the order of nodes allows.

    Args:
        graph: the rewritten graph; it stays as it is.
        executors: in order of preference.
        target: where it is to run.
        remarks: takes the reasons of what was refused.

    Raises:
        LoweringError: no executor takes a node.
    """
    units = whole_units(graph)
    refusals = [refusals_of(unit.nodes[0], executors, target) for unit in units]
    owner = _first_choice(units, refusals, remarks)
    return Cut(graph, executors, units, refusals, take_turns(units, owner))


def merged(found: Cut, target: Target, effort: str) -> Cut:
    """The same with regions merged where what they gain is less than what it costs to hand over to them.

    A node then goes to another executor than the first that takes it: an island in a model of many small
    layers pulls its neighbours, or all of the model. Where nothing is gained, the cut that was given is
    returned.

    A search over the order of the regions finds the best owners in that order; these make an order with fewer
    regions, in which the next search may find more. It ends when the modelled total falls no more.

    Args:
        found: a cut.
        target: where it is to run.
        effort: "measured" times what a call of each executor costs here; "fast" takes that from a table.
    """
    if len(found.groups) < 2:
        return found
    costs = Costs(found.executors, target, effort)
    able = costs.of_units(found.units, found.refusals)
    best = _total(found, able, costs)
    while True:
        order = [index for _, members in found.groups for index in members]
        alive = _alive(found.units, order)
        owner = cheapest(order, able, functools.partial(_change, costs, alive))
        turns = take_turns(found.units, [owner[index] for index in range(len(found.units))])
        moved = replace(found, groups=turns)
        total = _total(moved, able, costs)
        if total >= best:
            return found
        found, best = moved, total


def compiled(
    found: Cut, target: Target, remarks: Remarks, effort: str = "measured", name: str = "region"
) -> Plan:
    """Compile the regions of a cut; one that fails goes to the next executor, with a remark.

    Args:
        found: the cut.
        target: where it is to run.
        remarks: takes what failed, and what each region costs at least.
        effort: "measured" lets executors time alternatives, "fast" does not.
        name: of the steps, before their number.

    Raises:
        LoweringError: all executors failed on a region.
    """
    steps: list[Step] = []
    names = [executor.name for executor in found.executors]
    for index, (owner, members) in enumerate(found.groups):
        nodes = [node for member in members for node in found.units[member].nodes]
        region = extract(found.graph, sorted(nodes), f"{name}{index}")
        step = _compile(region, found.executors[names.index(owner) :], target, remarks, effort)
        steps.append(replace(step, reason=_why_here(step.executor, owner, found, members)))
        _analyse(steps[-1], target, remarks)
    outputs, constants = ends_of(found.graph)
    inputs = tuple(node.name for node in found.graph.placeholders)
    returned = (node.name for node in found.graph.output.all_input_nodes)
    return Plan(target.device, inputs, outputs, constants, with_lifetimes(steps, returned))


def refusals_of(node: fx.Node, executors: Sequence[Executor], target: Target) -> Refusals:
    """Why executors cannot take a node; None for those that can.

    Raises:
        LoweringError: none of them takes it.
    """
    found: Refusals = {}
    for executor in executors:
        if is_symbolic(node) and executor.name != "eager":
            found[executor.name] = "the model returns this size: it is a number, not a tensor"
        else:
            found[executor.name] = executor.supports(node, target)
    if None not in found.values():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.items())
        raise LoweringError(
            f"no executor runs {op_name(node)} ({node.name}): {reasons}",
            where=provenance.of(node).source or None,
            hint="let eager take the rest: executors=(..., 'eager')",
        )
    return found


def _first_choice(units: Sequence[Unit], refusals: Sequence[Refusals], remarks: Remarks) -> list[str]:
    """The first executor that takes each unit; why those before it do not is remarked."""
    owner = []
    for unit, found in zip(units, refusals, strict=True):
        name = _first_that_takes(found)
        for other, reason in found.items():
            if other == name:
                break
            remarks.add("missed", "partition", unit.nodes[0], f"{other}: {reason}")
        owner.append(name)
    return owner


def _first_that_takes(refusals: Refusals) -> str:
    return next(name for name, reason in refusals.items() if reason is None)


def _change(costs: Costs, alive: Sequence[float], place: int, name: str, before: str | None) -> float:
    return costs.of_change(before, name, alive[place])


def _total(found: Cut, able: Sequence[dict[str, float]], costs: Costs) -> float:
    """What all units of a cut cost, and all changes."""
    alive = _alive(found.units, [index for _, members in found.groups for index in members])
    total, place, before = 0.0, 0, None
    for name, members in found.groups:
        total += costs.of_change(before, name, alive[place]) + sum(able[index][name] for index in members)
        place, before = place + len(members), name
    return total


def _alive(units: Sequence[Unit], order: Sequence[int]) -> list[float]:
    """Bytes of the units' values that are there before each place of an order, and read from it on."""
    last = {source: place for place, index in enumerate(order) for source in units[index].needs}
    ends: dict[int, float] = defaultdict(float)
    now, found = 0.0, []
    for place, index in enumerate(order):
        found.append(now)
        now -= ends[place]
        if index in last:
            size = tensor_bytes(units[index].nodes[0].meta.get("val"))
            now += size
            ends[last[index]] += size
    return found


_NAMED = 3  # reasons, and nodes of a reason, in a plan's row


def _why_here(executor: str, chosen: str, found: Cut, members: Sequence[int]) -> str:
    """Why a region is where it is, in words."""
    if executor != chosen:
        return f"{chosen} failed to compile it"
    first = found.executors[0].name
    refused: dict[str, list[str]] = defaultdict(list)
    pulled = 0
    for index in members:
        reason = found.refusals[index][first]
        if reason is not None:
            refused[f"{first}: {reason}"].append(found.units[index].nodes[0].name)
        pulled += executor != _first_that_takes(found.refusals[index])
    reasons = [f"{reason} ({_few(names)})" for reason, names in list(refused.items())[:_NAMED]]
    if len(refused) > _NAMED:
        reasons.append(f"{len(refused) - _NAMED} reasons more")
    if pulled:
        reasons.append(f"{pulled} nodes stay beside them: handing over to {first} and back would cost more")
    return "; ".join(reasons) or f"{executor} is the first choice"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


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


def with_lifetimes(steps: Sequence[Step], returned: Iterable[str]) -> tuple[Step, ...]:
    """Note for each step which values die with it: all but those that are returned."""
    alive = set(returned)
    placed: list[Step] = []
    for step in reversed(steps):
        frees = [name for name in (*step.region.reads, *step.region.writes) if name not in alive]
        alive.update(frees)
        placed.append(replace(step, frees=tuple(dict.fromkeys(frees))))
    return tuple(reversed(placed))
