"""A plan over several devices: which of them computes what, by costs on paper, and the copies in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.compiler.remarks import Remarks
from graphopt.errors import LoweringError, TargetError
from graphopt.ir.graph import Graph, has_effect, is_symbolic, writes_in_place
from graphopt.runtime.crossing import Costs
from graphopt.runtime.executors import Executor
from graphopt.runtime.partition import compiled, cut, merged, refusals_of, with_lifetimes
from graphopt.runtime.plan import Plan, Step, Value, ends_of
from graphopt.runtime.region import extract
from graphopt.runtime.regions import Unit, whole_units
from graphopt.runtime.scheduling.links import machine_of
from graphopt.runtime.scheduling.lists import list_schedule
from graphopt.runtime.scheduling.placing import parts_of, unit_tasks
from graphopt.runtime.scheduling.streams import Streams
from graphopt.runtime.scheduling.tasks import Machine
from graphopt.runtime.target import Target
from graphopt.runtime.transfer import EXECUTOR, Weights, relocated, transfer

_WORTH = 0.95  # of the time on one device that several may take on paper, for the plan to be compiled

ExecutorsOf = Callable[[Target], Sequence[Executor]]


def plan_across(
    graph: Graph,
    target: Target,
    executors_of: ExecutorsOf,
    remarks: Remarks,
    effort: str,
    machine: Machine | None = None,
) -> Plan:
    """Spread a graph over a target's devices where that is faster on paper, and compile the parts.

    Args:
        graph: the rewritten graph; it stays as it is.
        target: with devices beside its own.
        executors_of: the executors on one of the devices, in order of preference.
        remarks: takes what was decided, and what each step costs at least.
        effort: "measured" times calls of executors and copies between devices here; "fast" takes tables.
        machine: the devices by their names, and what copies between them take; None for those that are here.

    Raises:
        LoweringError: the graph must stay together, or nothing is gained by the other devices.
        TargetError: a GPU is not there.
    """
    _require_there(target)
    targets = {str(d): Target(d, target.ort) for d in (target.device, *target.beside)}
    home = str(target.device)
    _require_one_home(graph, target.device)
    units = whole_units(graph)
    seconds = _seconds(units, targets, executors_of, effort)
    machine = machine or machine_of([each.device for each in targets.values()], measured=effort != "fast")
    schedule = list_schedule(unit_tasks(graph, units, seconds, home), machine)
    alone, together = 1e3 * sum(took[home] for took in seconds), 1e3 * schedule.makespan
    said = f"on paper {', '.join(targets)} take {together:.3f} ms, copies included, and {home} {alone:.3f} ms"
    remarks.add("analysis", "scheduler", None, said)
    if together > _WORTH * alone:
        raise LoweringError(f"nothing is gained by more devices: {said}")
    spread = _Spread(graph, targets, executors_of, remarks, effort)
    for device, members in parts_of(schedule, units):
        spread.add(device, [node for member in members for node in units[member].nodes])
    return spread.plan(target.device)


def _require_there(target: Target) -> None:
    found = torch.cuda.device_count()
    for device in target.beside:
        if device.type == "cuda" and (device.index or 0) >= found:
            raise TargetError(f"{device} is not there: PyTorch sees {found} GPUs")


def _require_one_home(graph: Graph, home: torch.device) -> None:
    """Every value is on one device, is a tensor at the border, and nothing has an effect."""
    for node in graph.nodes:
        if node.op == "call_function" and (has_effect(node) or writes_in_place(node)):
            raise LoweringError(f"{node.name} has an effect: the order of calls must stay as it is")
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != home.type:
                raise LoweringError(f"{node.name} is on {leaf.device}: the model spreads itself already")
    for node in graph.output.all_input_nodes:
        if is_symbolic(node):
            raise LoweringError(f"the output {node.name} is a size, which no device holds")


def _seconds(
    units: Sequence[Unit], targets: Mapping[str, Target], executors_of: ExecutorsOf, effort: str
) -> list[dict[str, float]]:
    """By unit, what it takes on each device, on the executor that is the fastest there."""
    found: list[dict[str, float]] = [{} for _ in units]
    for name, target in targets.items():
        executors = executors_of(target)
        refusals = [refusals_of(unit.nodes[0], executors, target) for unit in units]
        costs = Costs(executors, target, effort).of_units(units, refusals)
        for took, able in zip(found, costs, strict=True):
            took[name] = 1e-3 * min(able.values())
    return found


class _Spread:
    """Collects the steps of a plan over several devices, and copies what a device does not have yet."""

    def __init__(
        self,
        graph: Graph,
        targets: Mapping[str, Target],
        executors_of: ExecutorsOf,
        remarks: Remarks,
        effort: str,
    ) -> None:
        self._graph, self._targets, self._executors_of = graph, targets, executors_of
        self._remarks, self._effort = remarks, effort
        self._steps: list[Step] = []
        self._nodes = {node.name: node for node in graph.nodes}
        self._home = next(iter(targets))
        self._where = {node.name: self._home for node in graph.placeholders}
        self._copies: dict[tuple[str, str], str] = {}
        self._weights: dict[str, Weights] = {name: {} for name in targets}

    def add(self, device: str, nodes: Sequence[fx.Node]) -> None:
        """Compile a part for a device, after the copies that it needs."""
        target = self._targets[device]
        region = extract(self._graph, sorted(nodes), "part")
        reads = [self._there(name, device) for name in region.reads]
        moved = relocated(region, target.device, reads, self._weights[device])
        found = cut(moved.graph, self._executors_of(target), target, self._remarks)
        found = merged(found, target, self._effort)
        name = f"region{len(self._steps)}_"
        for step in compiled(found, target, self._remarks, self._effort, name).steps:
            self._steps.append(replace(step, device=target.device))
        self._where.update(dict.fromkeys(region.writes, device))

    def _there(self, name: str, device: str) -> str:
        """What a value is called on a device; it is copied there when it is asked for first."""
        if self._where[name] == device:
            return name
        if (name, device) not in self._copies:
            copy = f"{name}_on_{device.replace(':', '_')}"
            while copy in self._nodes:
                copy += "_"
            way = self._targets[self._where[name]].device, self._targets[device].device
            step = transfer(f"copy{len(self._steps)}", self._nodes[name], name, copy, way)
            self._steps.append(step)
            self._copies[name, device] = copy
        return self._copies[name, device]

    def plan(self, home: torch.device) -> Plan:
        """The plan, its outputs at home."""
        outputs, constants = ends_of(self._graph)
        ends: tuple[Any, ...] = tuple(
            Value(self._there(end.name, self._home))
            if isinstance(end, Value) and end.name not in constants
            else end
            for end in outputs
        )
        steps = _as_queued(self._steps)
        returned = [end.name for end in ends if isinstance(end, Value)]
        inputs = tuple(node.name for node in self._graph.placeholders)
        plan = Plan(home, inputs, ends, constants, with_lifetimes(steps, returned))
        return replace(plan, runner=Streams(plan))


def _as_queued(steps: Sequence[Step]) -> list[Step]:
    """Steps in an order in which the host queues them without keeping a GPU waiting.

    What a GPU computes or copies is queued as soon as all that it reads has been; what the CPU computes keeps
    the host until it is done, and comes when nothing else can be queued.
    """
    makers = {name: index for index, step in enumerate(steps) for name in step.region.writes}
    missing = [{makers[name] for name in step.region.reads if name in makers} for step in steps]
    left = list(range(len(steps)))
    order: list[int] = []
    while left:
        ready = [index for index in left if missing[index].issubset(order)]
        order.append(next((index for index in ready if not _keeps_the_host(steps[index])), ready[0]))
        left.remove(order[-1])
    return [steps[index] for index in order]


def _keeps_the_host(step: Step) -> bool:
    return step.executor != EXECUTOR and step.device is not None and step.device.type == "cpu"
