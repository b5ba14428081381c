"""Models spread over devices: who gets what on paper, and the answer of the plan.

Without a second device there is ``cpu:0`` beside ``cpu``: to PyTorch another device, with the same memory. So
parts, copies and answers are real, and only speed is not; where the parts go is decided on machines on paper.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture.export import capture
from graphopt.compiler.device import GPUS, Limits
from graphopt.compiler.reference import computed, output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import LoweringError, TargetError
from graphopt.ir.graph import Graph
from graphopt.runtime import across, crossing, scheduler
from graphopt.runtime.across import plan_across
from graphopt.runtime.crossing import Speed
from graphopt.runtime.executors import Executor
from graphopt.runtime.partition import find_executors
from graphopt.runtime.plan import Plan
from graphopt.runtime.regions import whole_units
from graphopt.runtime.scheduling.lists import Placement, Schedule, list_schedule
from graphopt.runtime.scheduling.placing import INPUTS, OUTPUTS, paper_tasks, parts_of
from graphopt.runtime.scheduling.tasks import Device, Machine
from graphopt.runtime.target import Target
from tests._models import randn, randomised

CPU, OTHER = torch.device("cpu"), torch.device("cpu:0")
TARGET = Target(CPU, beside=(OTHER,))
WIDTH = 64
X = randn(8, WIDTH)
NEAR = Machine((Device("cpu", "cpu"), Device("cpu:0", "cpu:0")), latency_s=1e-6)
FAR = Machine((Device("cpu", "cpu"), Device("cpu:0", "cpu:0")), latency_s=1.0)


class Towers(nn.Module):
    """Two stacks that read one input and know nothing of each other, between two layers."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.left, self.right = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.first(x))
        left, right = x, x
        for one, two in zip(self.left, self.right, strict=True):
            left, right = torch.tanh(one(left)), torch.tanh(two(right))
        return self.last(left - right), right


@pytest.fixture(autouse=True)
def _node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node takes a millisecond on either device."""
    monkeypatch.setattr(crossing, "_CPU", {"eager": Speed(0.0, 1.0), "ort": Speed(0.0, 1.0)})


def eager(target: Target) -> list[Executor]:
    return find_executors(("eager",))


def spread(graph: Graph, machine: Machine = NEAR, remarks: Remarks | None = None) -> Plan:
    return plan_across(graph, TARGET, eager, remarks or Remarks(), "fast", machine)


def right(graph: Graph, plan: Plan, x: torch.Tensor = X) -> bool:
    reference = output_reference(graph, [x], MODEL_FLOOR_ULPS)
    return reference.compare(computed(graph, scheduler.run(plan, [x]))).ok


# The plan


def test_towers_run_on_two_devices_with_copies_between_them() -> None:
    graph = capture(randomised(Towers()), (X,))
    plan = spread(graph)
    computing = [step for step in plan.steps if step.executor == "eager"]
    devices = Counter(str(step.device) for step in computing for _ in step.region.graph.calls)
    assert devices == {"cpu": 10, "cpu:0": 6}  # first, last, the difference and one tower; the other tower
    copies = [(row["from"], row["device"]) for row in plan.rows() if row["executor"] == "transfer"]
    assert copies == [("cpu", "cpu:0"), ("cpu:0", "cpu")]
    assert right(graph, plan)


def test_values_are_let_go_of_and_copies_have_names_of_their_own() -> None:
    plan = spread(capture(randomised(Towers()), (X,)))
    names = [name for step in plan.steps for name in step.region.writes]
    assert len(set(names)) == len(names)
    freed = [name for step in plan.steps for name in step.frees]
    returned = {end.name for end in plan.outputs}
    assert sorted(freed) == sorted({*names, *plan.inputs} - returned)
    assert len({step.region.name for step in plan.steps}) == len(plan.steps)


def test_a_part_has_its_constants_on_its_device_and_only_those() -> None:
    class Device(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = torch.tanh(x).exp().sin().cos()
            ramp = torch.arange(WIDTH, device=x.device).float().add(x).sin().cos().exp().tanh()
            return left + ramp

    plan = spread(capture(Device().eval(), (X,)))
    for step in plan.steps:
        for node in step.region.graph.nodes:
            given = node.kwargs.get("device")
            assert given is None or given == step.device
        if step.executor == "eager":
            assert all(node.meta["val"].device == step.device for node in step.region.graph.calls)
    weights = [
        set(step.region.graph.constants)
        for step in spread(capture(randomised(Towers()), (X,))).steps
        if step.device == OTHER and step.executor == "eager"
    ]
    assert [len(names) for names in weights] == [6]  # three weights and three biases, of one tower


def test_dynamic_sizes_are_computed_where_they_are_needed() -> None:
    class Sizes(Towers):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            one, two = super().forward(x)
            return one.reshape(-1)[: x.shape[0]], two.expand(2, x.shape[0], WIDTH)

    graph = capture(randomised(Sizes()), (X,), dynamic={"x": {0: "batch"}})
    plan = spread(graph)
    assert {str(step.device) for step in plan.steps} == {"cpu", "cpu:0"}
    assert right(graph, plan, randn(5, WIDTH))


def test_the_other_device_alone_may_be_the_best() -> None:
    """Of a CPU beside a fast GPU nothing is left to do but to hand over."""
    graph = capture(randomised(Towers()), (X,))
    units = whole_units(graph)
    placed = [Placement(INPUTS, "cpu", 0, 0), Placement(OUTPUTS, "cpu", 99, 99)]
    placed += [Placement(unit.nodes[0].name, "cpu:0", at, at + 1) for at, unit in enumerate(units)]
    assert parts_of(Schedule(tuple(placed)), units) == [("cpu:0", list(range(len(units))))]


def test_a_part_begins_where_it_needs_what_came_later_from_elsewhere() -> None:
    """a on one device, b on the other reads a, c on the first reads b; d, too, reads a."""

    class Four(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = x.sin()
            b, d = a.cos(), a.tan()
            return b.exp() + d

    units = whole_units(capture(Four().eval(), (X,)))
    assert [unit.nodes[0].name for unit in units] == ["sin", "cos", "tan", "exp", "add"]

    def parts(*order: str) -> list[tuple[str, list[int]]]:
        placed = (Placement(n, "cpu:0" if n == "cos" else "cpu", at, at + 1) for at, n in enumerate(order))
        return parts_of(Schedule(tuple(placed)), units)

    waits = [("cpu", [0]), ("cpu", [2]), ("cpu:0", [1]), ("cpu", [3, 4])]
    assert parts("sin", "tan", "cos", "exp", "add") == waits
    waits_not = [("cpu", [0]), ("cpu:0", [1]), ("cpu", [2, 3, 4])]
    assert parts("sin", "cos", "tan", "exp", "add") == waits_not


def test_a_gpus_work_is_queued_before_the_hosts() -> None:
    gpu = torch.device("cuda:0")
    plan = spread(capture(randomised(Towers()), (X,)))
    steps = [dataclasses.replace(step, device=gpu if step.device == OTHER else CPU) for step in plan.steps]
    host = [step for step in steps if across._keeps_the_host(step)]
    first, *rest = across._as_queued([*host, *(step for step in steps if step not in host)])
    assert first in host  # the layer before the towers
    assert [step in host for step in rest] == [False, False, False, True, True]


# Why not


def test_copies_that_cost_more_than_they_gain_are_not_made() -> None:
    remarks = Remarks()
    with pytest.raises(LoweringError, match=r"nothing is gained by more devices: on paper cpu, cpu:0 take"):
        spread(capture(randomised(Towers()), (X,)), FAR, remarks)
    assert "copies included" in remarks.rows[-1].reason


def test_a_chain_stays_where_it_is() -> None:
    chain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    with pytest.raises(LoweringError, match="nothing is gained"):
        spread(capture(randomised(chain), (X,)))


class Asserts(nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return x[: n.item()].sin()


def test_what_must_stay_together_does() -> None:
    graph = capture(Asserts().eval(), (X, torch.tensor(3)))
    with pytest.raises(LoweringError, match="has an effect"):
        spread(graph)


@pytest.mark.parametrize(
    ("device", "beside", "words"),
    [
        (CPU, (CPU,), "a device is named twice: cpu, cpu"),
        (CPU, (torch.device("meta"),), "cannot run a part of a model"),
        (CPU, ("cuda:1",), "cannot run a part of a model"),
        (CPU, (torch.device("cuda"),), "does not say which GPU"),
        (torch.device("cuda"), (torch.device("cuda:1"),), "does not say which GPU"),
    ],
)
def test_devices_that_are_none_are_refused(device: torch.device, beside: tuple, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        Target(device, beside=beside)


# The whole


@pytest.mark.parametrize("effort", ["fast", "measured"])
def test_it_is_a_candidate_beside_the_others(effort: str) -> None:
    """On paper two devices are faster; what is measured decides, unless nothing is."""
    model = randomised(Towers())
    opt = graphopt.optimize(model, (X,), target=TARGET, executors=("eager",), effort=effort)
    rows = {row.name: row for row in opt.report.candidates}
    assert set(rows) == {"several devices", "eager"}
    assert rows["several devices"].error is not None  # it ran, and its answer was compared
    assert rows["several devices"].chosen or effort == "measured"
    for found, wanted in zip(opt(X), model(X), strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-5)
    assert "on paper cpu, cpu:0 take" in str([row.reason for row in opt.report.remarks])


def test_without_the_device_that_was_to_help_the_model_runs_where_it_is() -> None:
    missing = Target(CPU, beside=(torch.device("cuda:63"),))
    opt = graphopt.optimize(randomised(Towers()), (X,), target=missing, executors=("eager",), effort="fast")
    (dropped,) = [row for row in opt.report.candidates if row.name == "several devices"]
    assert not dropped.chosen
    assert dropped.reason == f"cuda:63 is not there: PyTorch sees {torch.cuda.device_count()} GPUs"
    assert opt(X)[0].shape == X.shape


def test_a_device_whose_memory_is_too_small_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("of the other device")

    monkeypatch.setattr(across, "relocated", full)
    monkeypatch.setattr(across, "machine_of", lambda devices, measured: NEAR)
    opt = graphopt.optimize(randomised(Towers()), (X,), target=TARGET, executors=("eager",), effort="fast")
    (dropped,) = [row for row in opt.report.candidates if row.name == "several devices"]
    assert dropped.reason == "OutOfMemoryError: of the other device"


# A hundred devices on paper


def test_a_model_on_a_hundred_devices_that_are_not_here() -> None:
    """Requests of one model for a host and 99 GPUs: near the bound of the work, and the same every time."""
    graph = capture(randomised(Towers()), (X,))
    limits = {"host": Limits("host", 1e6, 1e6), "h100": dataclasses.replace(GPUS["h100"], bytes_per_s=1e9)}
    devices = (Device("host", "host"), *(Device(f"gpu{n}", "h100") for n in range(99)))
    machine = Machine(devices, {("host", "h100"): 25e9, ("h100", "h100"): 400e9}, latency_s=1e-9)
    tasks = paper_tasks(graph, limits, "host", requests=198)
    schedule = list_schedule(tasks, machine)
    assert schedule == list_schedule(paper_tasks(graph, limits, "host", requests=198), machine)
    assert len(schedule.placements) == len(tasks.tasks) == 198 * (len(whole_units(graph)) + 2)
    used = Counter(placed.device for placed in schedule.placements if placed.end > placed.start)
    assert "host" not in used
    assert len(used) == 99
    work = sum(task.seconds.get("h100", 0.0) for task in tasks.tasks.values()) / 99
    assert work <= schedule.makespan < 1.5 * work


@pytest.mark.gpu
def test_a_cpu_and_a_gpu_in_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(crossing, "_CUDA", {"eager": Speed(0.0, 1.0), "cuda": Speed(0.0, 1.0)})
    for home, other in ((CPU, gpu), (gpu, CPU)):
        model = randomised(Towers()).to(home)
        x = X.to(home)
        graph = capture(model, (x,))
        machine = Machine(tuple(Device(str(d), str(d)) for d in (home, other)))
        plan = plan_across(graph, Target(home, beside=(other,)), eager, Remarks(), "fast", machine)
        assert {step.device for step in plan.steps} == {home, other}
        reference = output_reference(graph, [x], MODEL_FLOOR_ULPS)
        for _ in range(20):
            assert reference.compare(computed(graph, scheduler.run(plan, [x]))).ok


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_plan() -> None:
    one, two = torch.device("cuda:0"), torch.device("cuda:1")
    model, x = randomised(Towers()).to(one), X.to(one)
    opt = graphopt.optimize(model, (x,), target=Target(one, beside=(two,)), effort="fast")
    with torch.no_grad():
        for found, wanted in zip(opt(x), model(x), strict=True):
            assert found.device == one
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
