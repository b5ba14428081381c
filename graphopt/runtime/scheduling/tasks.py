"""Task graphs and machines, as a schedule is made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from graphopt.compiler.cost import milliseconds, node_cost, node_dtype
from graphopt.compiler.device import Limits
from graphopt.errors import InputError
from graphopt.ir.graph import tensor_bytes

if TYPE_CHECKING:  # executors, which a plan holds, schedule their own calls
    from graphopt.runtime.plan import Plan


@dataclass(frozen=True)
class Task:
    """A piece of work that runs on one device without a break.

    Args:
        name: unique in its graph.
        seconds: how long it takes, by kind of device; a kind that is missing cannot run it.
        reads: bytes that it takes from other tasks, by their names.
    """

    name: str
    seconds: Mapping[str, float]
    reads: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """Something that runs one task at a time: a GPU's stream, a share of a CPU's cores.

    Args:
        name: unique in its machine.
        kind: devices of one kind take the same time for a task.
    """

    name: str
    kind: str


@dataclass(frozen=True)
class Machine:
    """Devices, and what it takes to bring data from one to another.

    Args:
        devices: all of them.
        bytes_per_s: between two devices, by a pair of their names or else of their kinds; both directions
            where only one is given.
        default_bytes_per_s: between all others; infinite where they share their memory.
        latency_s: of every transfer, besides, in seconds.
    """

    devices: tuple[Device, ...]
    bytes_per_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    default_bytes_per_s: float = float("inf")
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if not names or len(set(names)) < len(names):
            raise InputError(f"a machine needs devices of different names, not {names}")
        rates = (*self.bytes_per_s.values(), self.default_bytes_per_s)
        if not all(rate > 0 for rate in rates) or not self.latency_s >= 0:
            raise InputError("a bandwidth must be above 0 bytes a second, a latency 0 seconds or above")

    @cached_property
    def transfer(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds, and seconds a byte, from every device (row) to every device (column)."""
        count = len(self.devices)
        latency = np.full((count, count), self.latency_s)
        per_byte = np.array([[1 / self._rate(one, two) for two in self.devices] for one in self.devices])
        np.fill_diagonal(latency, 0.0)
        np.fill_diagonal(per_byte, 0.0)
        return latency, per_byte

    def _rate(self, one: Device, two: Device) -> float:
        for pair in ((one.name, two.name), (one.kind, two.kind)):
            for key in (pair, pair[::-1]):
                if key in self.bytes_per_s:
                    return self.bytes_per_s[key]
        return self.default_bytes_per_s


class TaskGraph:
    """Tasks, and who waits for whom.

    Args:
        tasks: in any order.

    Raises:
        InputError: a name occurs twice, a task reads from one that is not there, tasks wait for each other in
            a circle, or a time or size is negative.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks):
            raise InputError("two tasks have one name")
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from(self.tasks)
        for task in tasks:
            for source, count in task.reads.items():
                if source not in self.tasks:
                    raise InputError(f"task {task.name!r} reads from {source!r}, which is no task")
                self.graph.add_edge(source, task.name, bytes=count)
            if not all(value >= 0 for value in (*task.seconds.values(), *task.reads.values())):
                raise InputError(f"task {task.name!r} has a time or a size below 0")
        if not nx.is_directed_acyclic_graph(self.graph):
            circle = [source for source, _ in nx.find_cycle(self.graph)]
            raise InputError(f"tasks wait for each other: {' -> '.join([*circle, circle[0]])}")

    @cached_property
    def order(self) -> list[str]:
        """The tasks, each after those that it reads from, otherwise in the order given."""
        place = {name: index for index, name in enumerate(self.tasks)}
        return list(nx.lexicographical_topological_sort(self.graph, key=place.__getitem__))

    @property
    def is_chain(self) -> bool:
        """True when no two tasks could ever run side by side."""
        return not self.order or nx.dag_longest_path_length(self.graph) == len(self.order) - 1

    def critical_path(self, kind: str) -> list[str]:
        """The longest way through the graph on devices of a kind, without transfers: a bound on schedules."""
        weighted = nx.DiGraph()
        weighted.add_node("")
        for name in self.order:
            for source in ("", *self.graph.predecessors(name)):
                weighted.add_edge(source, name, weight=self.tasks[name].seconds[kind])
        return [name for name in nx.dag_longest_path(weighted) if name]


def plan_tasks(plan: Plan, seconds: Sequence[float], kind: str) -> TaskGraph:
    """A plan's steps as tasks.

    Args:
        plan: the plan.
        seconds: of each step, measured or estimated.
        kind: of the device that they are of.
    """
    sizes, owners = {}, {}
    for step in plan.steps:
        for name, node in zip(step.region.writes, step.region.results, strict=True):
            sizes[name], owners[name] = tensor_bytes(node.meta["val"]), step.region.name
    tasks = []
    for step, took in zip(plan.steps, seconds, strict=True):
        reads: dict[str, float] = {}
        for name in step.region.reads:
            if name in owners:
                reads[owners[name]] = reads.get(owners[name], 0.0) + sizes[name]
        tasks.append(Task(step.region.name, {kind: took}, reads))
    return TaskGraph(tasks)


def estimated_seconds(plan: Plan, limits: Limits) -> list[float]:
    """What each step takes at least on a device: the sum of its nodes' rooflines."""
    return [
        1e-3
        * sum(milliseconds(node_cost(node), limits, node_dtype(node)) for node in step.region.graph.calls)
        for step in plan.steps
    ]
