"""List scheduling on paper: invariants, bounds against the best schedule there is, and known cases."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import InputError
from graphopt.runtime.scheduling.lists import Schedule, list_schedule
from graphopt.runtime.scheduling.tasks import Device, Machine, Task, TaskGraph

CPU_GPU = Machine((Device("cpu", "cpu"), Device("gpu", "gpu")), {("cpu", "gpu"): 1.0})


def equal(count: int) -> Machine:
    return Machine(tuple(Device(f"gpu{number}", "gpu") for number in range(count)))


def chain(*seconds: dict[str, float], size: float = 0.0) -> TaskGraph:
    return TaskGraph(
        [Task(f"t{i}", took, {f"t{i - 1}": size} if i else {}) for i, took in enumerate(seconds)]
    )


def fork(*seconds: float) -> TaskGraph:
    ends = {f"t{i}": 0.0 for i in range(len(seconds))}
    branches = [Task(name, {"gpu": took}, {"root": 0.0}) for name, took in zip(ends, seconds, strict=True)]
    return TaskGraph([Task("root", {"gpu": 1.0}), *branches, Task("join", {"gpu": 1.0}, ends)])


def shortest(graph: TaskGraph, machine: Machine) -> float:
    """The makespan of the best schedule: every order that is one, every choice of devices."""
    best, names = math.inf, list(graph.tasks)
    latency, per_byte = machine.transfer
    for order in itertools.permutations(names):
        if any(
            order.index(source) > order.index(name) for name in names for source in graph.tasks[name].reads
        ):
            continue
        for devices in itertools.product(range(len(machine.devices)), repeat=len(names)):
            on, ends, free = dict(zip(order, devices, strict=True)), {}, [0.0] * len(machine.devices)
            for name in order:
                took = graph.tasks[name].seconds.get(machine.devices[on[name]].kind, math.inf)
                start = free[on[name]]
                for source, size in graph.tasks[name].reads.items():
                    way = latency[on[source], on[name]] + size * per_byte[on[source], on[name]]
                    start = max(start, ends[source] + way)
                ends[name] = free[on[name]] = start + took
            best = min(best, max(ends.values()))
    return best


def check(schedule: Schedule, graph: TaskGraph, machine: Machine) -> None:
    """Every task once, on a device that can run it, after its inputs are there, and none beside another."""
    assert sorted(placed.task for placed in schedule.placements) == sorted(graph.tasks)
    places = {device.name: place for place, device in enumerate(machine.devices)}
    latency, per_byte = machine.transfer
    at = {placed.task: placed for placed in schedule.placements}
    for name, placed in at.items():
        kind = machine.devices[places[placed.device]].kind
        assert placed.end == pytest.approx(placed.start + graph.tasks[name].seconds[kind])
        for source, size in graph.tasks[name].reads.items():
            row, column = places[at[source].device], places[placed.device]
            there = at[source].end + latency[row, column] + size * per_byte[row, column]
            assert placed.start >= there - 1e-9
    for device in machine.devices:
        row = schedule.on(device.name)
        assert all(one.end <= two.start + 1e-9 for one, two in itertools.pairwise(row))
    assert schedule.makespan == max(placed.end for placed in schedule.placements)


@st.composite
def graphs(draw: Any, most: int, kinds: tuple[str, ...] = ("gpu",)) -> TaskGraph:
    tasks: list[Task] = []
    for number in range(draw(st.integers(1, most))):
        seconds = {kind: float(draw(st.integers(0, 9))) for kind in kinds}
        sources = (
            draw(st.lists(st.sampled_from(tasks), max_size=3, unique_by=lambda t: t.name)) if tasks else []
        )
        reads = {source.name: float(draw(st.integers(0, 5))) for source in sources}
        tasks.append(Task(f"t{number}", seconds, reads))
    draw(st.randoms()).shuffle(tasks)
    return TaskGraph(tasks)


@settings(max_examples=50)
@given(graphs(12, ("cpu", "gpu")), st.integers(1, 3), st.integers(0, 2), st.sampled_from([0.0, 0.5]))
def test_schedules_are_possible_and_the_same_every_time(
    graph: TaskGraph, gpus: int, cpus: int, latency: float
) -> None:
    devices = [Device(f"gpu{n}", "gpu") for n in range(gpus)] + [
        Device(f"cpu{n}", "cpu") for n in range(cpus)
    ]
    machine = Machine(tuple(devices), {("cpu", "gpu"): 2.0}, 4.0, latency)
    schedule = list_schedule(graph, machine)
    check(schedule, graph, machine)
    assert list_schedule(graph, machine) == schedule
    for kind in {device.kind for device in devices}:
        alone = sum(task.seconds[kind] for task in graph.tasks.values())
        assert schedule.makespan <= alone + 1e-9


@settings(max_examples=50)
@given(graphs(5), st.integers(1, 3))
def test_on_equal_devices_it_is_at_most_twice_as_long_as_the_shortest(graph: TaskGraph, count: int) -> None:
    best = shortest(graph, equal(count))
    found = list_schedule(graph, equal(count)).makespan
    assert best - 1e-9 <= found <= (2 - 1 / count) * best + 1e-9
    path = graph.critical_path("gpu")
    assert best >= sum(graph.tasks[name].seconds["gpu"] for name in path)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), st.integers(0, 6))
def test_a_chain_is_placed_as_well_as_it_can_be(times: list[tuple[int, int]], size: int) -> None:
    graph = chain(*({"cpu": float(one), "gpu": float(two)} for one, two in times), size=float(size))
    assert graph.is_chain
    assert list_schedule(graph, CPU_GPU).makespan == pytest.approx(shortest(graph, CPU_GPU))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_a_fork_with_a_device_for_every_branch_takes_its_longest_branch(branches: list[int]) -> None:
    graph = fork(*map(float, branches))
    assert not graph.is_chain
    assert list_schedule(graph, equal(len(branches))).makespan == 2 + max(branches)


def test_the_critical_path_goes_first() -> None:
    """In the order given, the long branch would begin last: 1 + 3 + 3 + 5 instead of 1 + 6."""
    tasks = [Task("root", {"gpu": 1.0})]
    tasks += [Task(f"short{n}", {"gpu": 3.0}, {"root": 0.0}) for n in range(2)]
    tasks += [Task("long", {"gpu": 6.0}, {"root": 0.0})]
    schedule = list_schedule(TaskGraph(tasks), equal(2))
    assert schedule.makespan == 7
    assert schedule.of("long").start == 1


def test_a_transfer_that_costs_more_than_it_gains_is_not_made() -> None:
    for size, device in ((1.0, "gpu"), (100.0, "cpu")):
        graph = TaskGraph(
            [
                Task("inputs", {"cpu": 0.0}),  # they are in the memory of the CPU
                Task("work", {"cpu": 10.0, "gpu": 1.0}, {"inputs": size}),
            ]
        )
        assert list_schedule(graph, CPU_GPU).of("work").device == device


def test_a_hundred_devices_on_paper() -> None:
    """One CPU and 99 GPUs, 200 requests of 2 steps each: near the bound of the work, in no time."""
    draw = random.Random(0)
    tasks = [Task("inputs", {"cpu": 0.0})]
    for request in range(200):
        for step in range(2):
            source = f"r{request}s{step - 1}" if step else "inputs"
            tasks.append(Task(f"r{request}s{step}", {"gpu": draw.uniform(1e-3, 3e-3)}, {source: 1e6}))
    devices = (Device("host", "cpu"), *(Device(f"gpu{n}", "gpu") for n in range(99)))
    machine = Machine(devices, {("cpu", "gpu"): 5e10, ("gpu", "gpu"): 4e11}, latency_s=1e-6)
    graph = TaskGraph(tasks)
    schedule = list_schedule(graph, machine)
    check(schedule, graph, machine)
    work = sum(task.seconds.get("gpu", 0.0) for task in tasks) / 99
    assert work < schedule.makespan < 1.6 * work
    assert len(schedule.rows()) == 401


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TaskGraph([Task("a", {"gpu": 1.0}), Task("a", {"gpu": 1.0})]), "two tasks have one name"),
        (lambda: TaskGraph([Task("a", {}, {"b": 0.0})]), "task 'a' reads from 'b', which is no task"),
        (
            lambda: TaskGraph([Task("a", {}, {"b": 0.0}), Task("b", {}, {"a": 0.0})]),
            "tasks wait for each other: a -> b -> a",
        ),
        (lambda: TaskGraph([Task("a", {"gpu": -1.0})]), "task 'a' has a time or a size below 0"),
        (lambda: Machine(()), "a machine needs devices of different names, not []"),
        (
            lambda: Machine((Device("a", "gpu"),), latency_s=-1.0),
            "a bandwidth must be above 0 bytes a second",
        ),
        (
            lambda: list_schedule(TaskGraph([Task("a", {"tpu": 1.0})]), CPU_GPU),
            "no device can run task 'a': it has no time on cpu, gpu",
        ),
    ],
)
def test_what_is_no_problem_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert error.value.message.startswith(words)


def test_nothing_to_do() -> None:
    assert list_schedule(TaskGraph([]), equal(2)).makespan == 0
