"""Which device computes what of a graph: its calls as tasks, and a schedule of them cut into parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from graphopt.compiler.cost import milliseconds, node_cost, node_dtype
from graphopt.compiler.device import Limits
from graphopt.ir.graph import Graph, tensor_bytes
from graphopt.runtime.regions import Unit, whole_units
from graphopt.runtime.scheduling.lists import Schedule
from graphopt.runtime.scheduling.tasks import Task, TaskGraph

INPUTS, OUTPUTS = "(inputs)", "(outputs)"  # no node is called so

Seconds = Sequence[Mapping[str, float]]


def unit_tasks(graph: Graph, units: Sequence[Unit], seconds: Seconds, home: str) -> TaskGraph:
    """The calls of a graph as tasks, between its inputs and its outputs, which are on one device.

    Args:
        graph: the graph.
        units: its calls; a task is called after the first node of its unit.
        seconds: of every unit, by kind of device; a kind that is missing cannot run it.
        home: the kind of the one device that the inputs and the outputs are on.
    """
    return TaskGraph(_tasks(graph, units, seconds, home, ""))


def paper_tasks(graph: Graph, limits: Mapping[str, Limits], home: str, requests: int = 1) -> TaskGraph:
    """Calls of a model as tasks that take what the rooflines of devices say, which need not be here.

        machine = Machine((Device("host", "cpu"), *(Device(f"gpu{n}", "h100") for n in range(99))), ...)
        tasks = paper_tasks(graph, {"cpu": cpu_limits(), "h100": gpu_limits("h100")}, "cpu", requests=200)
        list_schedule(tasks, machine).makespan

    Args:
        graph: the model's.
        limits: of every kind of device.
        home: the kind of device that the inputs and the outputs are on.
        requests: how many calls of the model there are; tasks of the n-th end in "#n".
    """
    units = whole_units(graph)
    seconds = [
        {
            kind: 1e-3 * sum(milliseconds(node_cost(n), limit, node_dtype(n)) for n in unit.nodes)
            for kind, limit in limits.items()
        }
        for unit in units
    ]
    tasks = (_tasks(graph, units, seconds, home, f"#{number}") for number in range(requests))
    return TaskGraph([task for each in tasks for task in each])


def _tasks(graph: Graph, units: Sequence[Unit], seconds: Seconds, home: str, suffix: str) -> list[Task]:
    owners: dict[fx.Node, str] = dict.fromkeys(graph.placeholders, INPUTS + suffix)
    names = [unit.nodes[0].name + suffix for unit in units]
    owners |= {node: name for unit, name in zip(units, names, strict=True) for node in unit.nodes}
    tasks = [Task(INPUTS + suffix, {home: 0.0})]
    for unit, name, took in zip(units, names, seconds, strict=True):
        reads = {names[index]: 0.0 for index in unit.needs} | _reads(unit.nodes, owners)
        reads.pop(name, None)
        tasks.append(Task(name, took, reads))
    tasks.append(Task(OUTPUTS + suffix, {home: 0.0}, _reads([graph.output], owners)))
    return tasks


def _reads(nodes: Sequence[fx.Node], owners: Mapping[fx.Node, str]) -> dict[str, float]:
    """Bytes that nodes read, by the task that they are of."""
    found: dict[str, float] = {}
    for source in dict.fromkeys(source for node in nodes for source in node.all_input_nodes):
        if source in owners:
            found[owners[source]] = found.get(owners[source], 0.0) + tensor_bytes(source.meta.get("val"))
    return found


def parts_of(schedule: Schedule, units: Sequence[Unit]) -> list[tuple[str, list[int]]]:
    """A schedule of units as parts, each of which one device runs without a break.

    A part ends where another device waits for its last value, so that the copy starts at once, and begins
    where it needs a value that was made elsewhere after the part before it had begun.

    Args:
        schedule: of the tasks of ``unit_tasks``.
        units: the units.

    Returns:
        The device and the indices of units of each part, in an order in which each part can run once those
        before it have.
    """
    index_of = {unit.nodes[0].name: index for index, unit in enumerate(units)}
    order = [index_of[placed.task] for placed in schedule.placements if placed.task in index_of]
    on = {index_of[p.task]: p.device for p in schedule.placements if p.task in index_of}
    place = {index: position for position, index in enumerate(order)}
    sent = {source for index in order for source in units[index].needs if on[source] != on[index]}
    parts: list[tuple[str, list[int]]] = []
    now: dict[str, list[int]] = {}  # the part that each device is in
    for index in order:
        device = on[index]
        part = now.get(device)
        foreign = [place[source] for source in units[index].needs if on[source] != device]
        if part is None or max(foreign, default=-1) > place[part[0]]:
            part = now[device] = []
            parts.append((device, part))
        part.append(index)
        if index in sent:
            del now[device]
    return parts
