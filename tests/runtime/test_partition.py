"""Mixed plans: islands, what they pull, what crosses a border and how, and what the plan says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt.capture.export import capture
from graphopt.compiler.reference import computed, output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.graph import Graph
from graphopt.runtime import crossing, partition, scheduler
from graphopt.runtime.crossing import Speed
from graphopt.runtime.executors import EXECUTORS
from graphopt.runtime.plan import Plan
from graphopt.runtime.target import Target
from tests._models import randn, randomised

CPU = Target(torch.device("cpu"))
LAYERS, WIDTH = 12, 8
X = randn(4, WIDTH)


class Islands(nn.Module):
    """Layers, some of which have an op that has no ONNX translation."""

    def __init__(self, islands: Sequence[int], width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.islands = frozenset(islands)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            y = torch.tanh(layer(x))
            x = x + (torch.special.bessel_j0(y) if index in self.islands else y)
        return x


def graph_of(islands: Sequence[int]) -> Graph:
    return capture(randomised(Islands(islands)), (X,))


def table(monkeypatch: pytest.MonkeyPatch, call_ms: float, node_ms: float = 0.0) -> None:
    """Costs: a call of any executor, and a node on eager above one on ONNX Runtime."""
    speeds = {"ort": Speed(call_ms, 0.001), "eager": Speed(call_ms, 0.001 + node_ms)}
    monkeypatch.setattr(crossing, "_CPU", speeds)


def cut(graph: Graph) -> partition.Cut:
    return partition.cut(graph, partition.find_executors(("ort", "eager")), CPU, Remarks())


def owners(found: partition.Cut) -> list[str]:
    return [name for name, _ in found.groups]


def right(graph: Graph, plan: Plan) -> bool:
    reference = output_reference(graph, [X], MODEL_FLOOR_ULPS)
    return reference.compare(computed(graph, scheduler.run(plan, [X]))).ok


@pytest.mark.parametrize("islands", [range(LAYERS), (3, 7), (6,), ()], ids=["all", "two", "one", "none"])
def test_dear_crossings_leave_one_region(monkeypatch: pytest.MonkeyPatch, islands: Sequence[int]) -> None:
    table(monkeypatch, call_ms=1.0, node_ms=0.001)
    graph = graph_of(islands)
    found = partition.merged(cut(graph), CPU, "fast")
    assert owners(found) == (["eager"] if islands else ["ort"])
    assert right(graph, partition.compiled(found, CPU, Remarks(), "fast"))


@pytest.mark.parametrize("islands", [range(LAYERS), (3, 7), (6,)], ids=["all", "two", "one"])
def test_cheap_crossings_keep_every_region(monkeypatch: pytest.MonkeyPatch, islands: Sequence[int]) -> None:
    table(monkeypatch, call_ms=0.001, node_ms=1.0)
    graph = graph_of(islands)
    found = partition.merged(cut(graph), CPU, "fast")
    assert owners(found) == ["ort", "eager"] * len(islands) + ["ort"]
    plan = partition.compiled(found, CPU, Remarks(), "fast")
    assert right(graph, plan)
    for row in plan.rows():
        if row["executor"] == "eager":
            assert row["nodes"] == 1
            assert "ort: aten.special_bessel_j0.default has no ONNX translation" in row["reason"]
        else:
            assert row["reason"] == "ort is the first choice"


def test_near_islands_pull_what_lies_between_them_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, call_ms=0.05, node_ms=0.01)  # the three nodes between cost 0.03, two calls 0.1
    graph = graph_of((5, 6))
    found = partition.merged(cut(graph), CPU, "fast")
    assert owners(found) == ["ort", "eager", "ort"]
    plan = partition.compiled(found, CPU, Remarks(), "fast")
    middle = plan.rows()[1]
    assert middle["ops"]["aten.special_bessel_j0"] == 2
    assert middle["ops"]["aten.linear"] == 1
    assert "3 nodes stay beside them: handing over to ort and back would cost more" in middle["reason"]
    assert right(graph, plan)


def test_what_crosses_and_is_copied_costs_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    free, dear = Speed(0.001, 0.001), Speed(0.001, 0.002)
    graph = graph_of((6,))
    limits = dataclasses.replace(CPU.limits, bytes_per_s=1e6)
    monkeypatch.setattr(Target, "limits", property(lambda _: limits))
    for copies, wanted in ((False, ["ort", "eager", "ort"]), (True, ["eager"])):
        speeds = {"ort": dataclasses.replace(free, copies=copies), "eager": dear}
        monkeypatch.setattr(crossing, "_CPU", speeds)
        assert owners(partition.merged(cut(graph), CPU, "fast")) == wanted


def test_regions_that_an_independent_branch_would_split_are_one() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = torch.special.bessel_j0(x)  # ready at once, needed with the second
            y = torch.special.bessel_j0(torch.tanh(x))
            return torch.exp(first + y)

    graph = capture(Branches().eval(), (X,))
    found = cut(graph)
    assert owners(found) == ["ort", "eager", "ort"]
    assert right(graph, partition.compiled(found, CPU, Remarks(), "fast"))


class Copies(TorchDispatchMode):
    """Counts the ATen calls that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("clone", "copy_", "_to_copy", "contiguous")
        return func(*args, **(kwargs or {}))


def test_tensors_cross_both_ways_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of((6,))
    plan = partition.compiled(cut(graph), CPU, Remarks(), "fast")
    reads: dict[str, list[int]] = {}
    writes: dict[str, int] = {}
    for step in plan.steps:
        run = step.program.run

        def spied(inputs: Any, *, step: Any = step, run: Any = run) -> Any:
            reads[step.region.name] = [tensor.data_ptr() for tensor in inputs]
            results = run(inputs)
            writes.update({n: r.data_ptr() for n, r in zip(step.region.writes, results, strict=True)})
            return results

        monkeypatch.setattr(step.program, "run", spied)
    with Copies() as copies:
        scheduler.run(plan, [X])
    assert copies.count == 0
    first, island, last = plan.steps
    assert (first.executor, island.executor, last.executor) == ("ort", "eager", "ort")
    assert reads[island.region.name] == [writes[name] for name in island.region.reads]
    assert reads[last.region.name] == [writes[name] for name in last.region.reads]


def test_the_overhead_of_a_call_is_measured_once_and_falls_back_to_the_table() -> None:
    crossing._measured_call_ms.cache_clear()
    ort, cuda = EXECUTORS["ort"], EXECUTORS["cuda"]
    speed = crossing.speed_of(ort, CPU, measured=True)
    assert 0 < speed.call_ms < 50
    assert crossing.speed_of(ort, CPU, measured=True) is not None
    assert crossing._measured_call_ms.cache_info().misses == 1
    assert crossing.speed_of(ort, CPU, measured=False) == crossing._CPU["ort"]
    assert crossing.speed_of(cuda, CPU, measured=True) == crossing._UNKNOWN  # it runs on GPUs alone


def test_measured_candidates_show_both_cuts_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, call_ms=0.05, node_ms=0.01)
    monkeypatch.setattr(crossing, "_QUICK", ())
    opt = graphopt.optimize(randomised(Islands((5, 6))), (X,))
    names = [row.name for row in opt.report.candidates]
    assert names[:2] == ["ort", "ort (all that it takes)"]
    said = [row.reason for row in opt.report.remarks if row.pass_name == "candidates"]
    assert any(reason.startswith("ort: 3 regions, 2 on ort and 1 on eager, take ") for reason in said)
    assert any(
        reason.startswith("ort (all that it takes): 5 regions, 3 on ort and 2 on eager") for reason in said
    )
    assert all(row["reason"] for row in opt.report.plan)


def test_a_model_that_only_loses_by_crossing_runs_in_one_region() -> None:
    opt = graphopt.optimize(randomised(Islands(range(LAYERS))), (X,), effort="fast")
    assert [row["executor"] for row in opt.report.plan] == ["eager"]
    dropped = {row.name: row.reason for row in opt.report.candidates if row.reason}
    assert dropped == {"ort": "ort runs no part of it: handing over to it costs more than it gains"}
    assert torch.allclose(opt(X), Islands.forward(randomised(Islands(range(LAYERS))), X), atol=1e-5)


def test_executors_that_are_insisted_on_keep_their_preference() -> None:
    model = randomised(Islands((5, 6)))
    opt = graphopt.optimize(model, (X,), executors=("ort", "eager"), effort="fast")
    assert [row["executor"] for row in opt.report.plan] == ["ort", "eager", "ort", "eager", "ort"]
