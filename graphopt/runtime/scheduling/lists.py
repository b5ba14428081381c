"""List scheduling by critical path, on a described machine: a pure function, and a simulation at once.

Whenever a device is free, the tasks that are ready are looked at in the order of what is still to be done
after them, the longest way first. Each goes to the device on which it, and the way after it, would end first;
what that way takes is the optimistic cost table of Arabnejad and Barbosa (List scheduling algorithm for
heterogeneous systems by an optimistic cost table, IEEE TPDS, 2014), transfers included, so that a chain is
placed as well as it can be. On m equal devices without transfers no device is idle while a task is ready, so
that the schedule is at most 2 - 1/m times as long as the shortest (Graham: Bounds on multiprocessing timing
anomalies, 1969). It is never longer than all tasks on the best single device.

Transfers begin when the task that they come from ends; any number of them run at once.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import InputError
from graphopt.runtime.scheduling.tasks import Machine, TaskGraph


@dataclass(frozen=True)
class Placement:
    """When and where a task runs.

    Args:
        task: its name.
        device: the name of the device.
        start: in seconds.
        end: in seconds.
    """

    task: str
    device: str
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """When and where every task runs.

    Args:
        placements: by start.
    """

    placements: tuple[Placement, ...]

    @property
    def makespan(self) -> float:
        """The end of the last task, in seconds."""
        return max((placed.end for placed in self.placements), default=0.0)

    def of(self, task: str) -> Placement:
        """When and where a task runs."""
        return next(placed for placed in self.placements if placed.task == task)

    def on(self, device: str) -> list[Placement]:
        """What runs on a device, in order."""
        return [placed for placed in self.placements if placed.device == device]

    def rows(self) -> list[dict[str, Any]]:
        """A row a task, JSON-ready, in milliseconds."""
        return [
            {
                "task": placed.task,
                "device": placed.device,
                "start_ms": 1e3 * placed.start,
                "end_ms": 1e3 * placed.end,
            }
            for placed in self.placements
        ]


def list_schedule(graph: TaskGraph, machine: Machine) -> Schedule:
    """Place every task of a graph on a device of a machine; the same in every run.

    Raises:
        InputError: no device can run a task.
    """
    problem = _Problem(graph, machine)
    found = _Greedy(problem).run()
    return min([found, *problem.on_one_device()], key=lambda schedule: schedule.makespan)


class _Problem:
    """A graph and a machine in numbers; arrays are over devices.

    Attributes:
        took: seconds of a task on every device; infinite where it cannot run.
        after: seconds that the longest way after a task takes, at best, should the task run there.
        rank: seconds from a task's start to the end of all, on average over the devices that can run it.
    """

    def __init__(self, graph: TaskGraph, machine: Machine) -> None:
        self.graph, self.machine = graph, machine
        self.latency, self.per_byte = machine.transfer
        self.took: dict[str, np.ndarray] = {}
        self.after: dict[str, np.ndarray] = {}
        self.rank: dict[str, float] = {}
        for name in reversed(graph.order):
            seconds = graph.tasks[name].seconds
            self.took[name] = took = np.array([seconds.get(d.kind, np.inf) for d in machine.devices])
            if not np.isfinite(took).any():
                kinds = ", ".join(sorted({device.kind for device in machine.devices}))
                raise InputError(f"no device can run task {name!r}: it has no time on {kinds}")
            after = np.zeros(len(took))
            for user in graph.graph.successors(name):
                way = self.took[user] + self.after[user] + self.transfer(name, user)
                after = np.maximum(after, way.min(axis=1))
            self.after[name] = after
            self.rank[name] = float((took + after)[np.isfinite(took)].mean())

    def transfer(self, source: str, user: str) -> np.ndarray:
        """Seconds from every device (row) to every device (column)."""
        moved: float = self.graph.graph.edges[source, user]["bytes"]
        return self.latency + moved * self.per_byte

    def on_one_device(self) -> list[Schedule]:
        """All tasks on the first device of every kind that can run them, one after the other."""
        firsts: dict[str, int] = {}
        for place, device in enumerate(self.machine.devices):
            firsts.setdefault(device.kind, place)
        found = []
        for place in firsts.values():
            now, placements = 0.0, []
            for name in self.graph.order:
                end = now + float(self.took[name][place])
                placements.append(Placement(name, self.machine.devices[place].name, now, end))
                now = end
            if np.isfinite(now):
                found.append(Schedule(tuple(placements)))
        return found


class _Greedy:
    def __init__(self, problem: _Problem) -> None:
        self._problem = problem
        self._graph = problem.graph.graph
        self._place = {name: index for index, name in enumerate(problem.graph.order)}
        self._free = np.zeros(len(problem.machine.devices))
        self._on: dict[str, int] = {}
        self._ends: dict[str, float] = {}
        self._placements: list[Placement] = []

    def run(self) -> Schedule:
        now, order = 0.0, self._problem.graph.order
        missing = {name: self._graph.in_degree(name) for name in order}
        ready: list[tuple[float, int, str]] = []
        running: list[tuple[float, int, str]] = []
        for name in order:
            if not missing[name]:
                insort(ready, self._entry(name))
        while ready or running:
            for entry in list(ready):
                if not (self._free <= now).any():
                    break
                if self._try(entry[2], now):
                    ready.remove(entry)
                    insort(running, (self._ends[entry[2]], entry[1], entry[2]))
            now = running[0][0]
            while running and running[0][0] <= now:
                for user in self._graph.successors(running.pop(0)[2]):
                    missing[user] -= 1
                    if not missing[user]:
                        insort(ready, self._entry(user))
        return Schedule(tuple(sorted(self._placements, key=lambda one: one.start)))

    def _entry(self, name: str) -> tuple[float, int, str]:
        return -self._problem.rank[name], self._place[name], name

    def _try(self, name: str, now: float) -> bool:
        """Place a ready task, unless the best device for it is busy."""
        problem = self._problem
        there = np.full(len(self._free), now)
        for source in self._graph.predecessors(name):
            there = np.maximum(there, self._ends[source] + problem.transfer(source, name)[self._on[source]])
        start = np.maximum(there, self._free)
        best = int(np.argmin(start + problem.took[name] + problem.after[name]))
        if self._free[best] > now:
            return False
        begin = float(start[best])
        end = begin + float(problem.took[name][best])
        self._free[best], self._on[name], self._ends[name] = end, best, end
        self._placements.append(Placement(name, problem.machine.devices[best].name, begin, end))
        return True
