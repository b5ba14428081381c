"""One copy of the weights at a time: ways are compiled in turn, and what was not chosen keeps nothing."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch

from graphopt.capture.export import capture
from graphopt.compiler.reference import output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.graph import Graph
from graphopt.runtime import candidates as module
from graphopt.runtime import scheduler, ways
from graphopt.runtime.candidates import Candidate, Choice, choose
from graphopt.runtime.executors import EXECUTORS
from graphopt.runtime.executors._protocol import Resting, Silent
from graphopt.runtime.partition import partition
from graphopt.runtime.plan import Plan
from graphopt.runtime.target import Target
from tests._models import MLP, randn, randomised

X = randn(4, 8)
HOST = Target(torch.device("cpu"))


@pytest.fixture
def graph() -> Graph:
    return capture(randomised(MLP()), (X,))


def plan_on(executor: str, graph: Graph) -> Plan:
    return partition(graph, [EXECUTORS[executor]], HOST, Remarks(), "fast")


# Programs


def test_a_session_is_closed_and_opened_again(graph: Graph) -> None:
    plan = plan_on("ort", graph)
    (step,) = plan.steps
    program: Any = step.program
    assert isinstance(program, Resting)
    wanted = scheduler.run(plan, [X])
    session = weakref.ref(program._session)
    program.rest()
    gc.collect()
    assert session() is None
    torch.testing.assert_close(scheduler.run(plan, [X]), wanted, rtol=0, atol=0)
    _, times = program.profile([X])
    assert times
    program.rest()
    assert program.profile([X])[1] is times
    assert program.provider == "CPUExecutionProvider"


def test_inductors_modules_keep_no_weights(graph: Graph, one_kernel_alone: None) -> None:
    before = held_by_modules()
    plan = plan_on("inductor", graph)
    (step,) = plan.steps
    assert isinstance(step.program, Resting)
    wanted = scheduler.run(plan, [X])
    assert held_by_modules() > before
    step.program.rest()
    gc.collect()
    assert held_by_modules() == before
    torch.testing.assert_close(scheduler.run(plan, [X]), wanted)
    assert held_by_modules() > before
    del plan, step
    gc.collect()
    assert held_by_modules() == before


def held_by_modules() -> int:
    """How many tensors are in modules of Inductor's code."""
    from torch._inductor.codecache import PyCodeCache

    return sum(
        isinstance(value, torch.Tensor) for made in PyCodeCache.modules for value in vars(made).values()
    )


# In turn


class Weighty(Silent):
    """A program that holds a copy of the weights: of all of them one is awake at a time."""

    awake: ClassVar[set[str]] = set()
    most = 0

    def __init__(self, name: str, run: Any) -> None:
        self.name, self._run = name, run
        self._wake()

    def _wake(self) -> None:
        self.awake.add(self.name)
        Weighty.most = max(Weighty.most, len(self.awake))

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        self._wake()
        results: Sequence[Any] = self._run(inputs)
        return results

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[Any]]:
        return self.run(inputs), []

    def rest(self) -> None:
        self.awake.discard(self.name)


def weighty(name: str, graph: Graph) -> Candidate:
    plan = plan_on("eager", graph)
    (step,) = plan.steps
    step = dataclasses.replace(step, program=Weighty(name, step.program.run))
    return Candidate(name, graph, dataclasses.replace(plan, steps=(step,)))


def chosen(
    graph: Graph, given: list[Candidate], times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> Choice:
    """What is chosen where each takes so many times as long as the one that holds no copies."""
    Weighty.most = 0

    def beside(control: Candidate, candidate: Candidate, *_: Any) -> Any:
        scheduler.run(candidate.plan, [X])  # type: ignore[arg-type]
        assert not control.copies
        return module.Timing.of([times[candidate.name]] * 6)

    def warmed_up(candidate: Candidate, *_: Any) -> Any:
        scheduler.run(candidate.plan, [X])  # type: ignore[arg-type]
        return module.Timing.of([times[candidate.name]] * 6)

    def fastest(right: list[Candidate], *_: Any) -> Candidate:
        right[0].timing = module.Timing.of([times[right[0].name]] * 6)
        return right[0]

    monkeypatch.setattr(module, "_beside", beside)
    monkeypatch.setattr(module, "_warmed_up", warmed_up)
    monkeypatch.setattr(module, "_fastest", fastest)
    reference = output_reference(graph, [X], MODEL_FLOOR_ULPS)
    return choose(given, [X], reference, HOST, Remarks(), [[X]])


@pytest.fixture(autouse=True)
def _all_asleep() -> None:
    Weighty.awake.clear()


def later(name: str, graph: Graph) -> Candidate:
    return Candidate(name, graph, None, later=lambda: weighty(name, graph))


@pytest.mark.parametrize("best", ["own", "first", "second"])
def test_one_copy_is_awake_at_a_time_and_the_fastest_is_taken(
    graph: Graph, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"own": 0.8, "first": 0.9, "second": 0.7, best: 0.65}
    given = [weighty("own", graph), later("first", graph), later("second", graph)]
    given.append(Candidate("eager", graph, plan_on("eager", graph)))
    choice = chosen(graph, given, times, monkeypatch)
    assert choice.best.name == best
    assert Weighty.most == 1
    choice.rest_all_but(choice.plan)
    assert Weighty.awake == {best}


def test_what_is_hopeless_is_not_timed_beside_others(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [weighty("own", graph), later("first", graph), later("second", graph)]
    given.append(Candidate("eager", graph, plan_on("eager", graph)))
    choice = chosen(graph, given, {"own": 1.0, "first": 1.6, "second": 1.51}, monkeypatch)
    assert choice.best.name == "own"
    assert Weighty.most == 1
    found = {each.name: each.timing.median_ms for each in choice.candidates if each.timing is not None}
    assert found == {"own": 1.0, "first": 1.6, "second": 1.51}


def test_what_is_wrong_then_is_dropped(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    other = capture(randomised(MLP(), seed=1), (X,))
    made = Candidate("wrong", graph, None, later=lambda: weighty("wrong", other))
    control = Candidate("eager", graph, plan_on("eager", graph))
    choice = chosen(graph, [control, made], {"eager": 1.0, "wrong": 0.1}, monkeypatch)
    assert (choice.best.name, made.plan) == ("eager", None)
    assert made.reason


def test_where_all_others_fail_what_waits_is_made(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Candidate("own", graph, None, reason="it does not run")
    choice = chosen(graph, [failed, later("first", graph)], {"first": 1.0}, monkeypatch)
    assert choice.best.name == "first"


def test_on_a_cpu_inductor_waits_for_the_others(
    graph: Graph, one_kernel_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_WORTH_COMPILING_MS", 0.0)
    found = {each.name: each for each in ways.plan_candidates(graph, graph, None, HOST, Remarks())}
    assert found["inductor"].plan is None
    assert found["inductor"].later is not None
    assert found["ort"].copies
    assert not found["eager"].copies
    found["inductor"].make()
    assert found["inductor"].copies
    assert found["inductor"].later is None


def test_so_do_narrower_ways_that_hold_copies(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_WORTH_COMPILING_MS", 0.0)
    judge: Any = object()
    given = ways.narrowed_candidates(graph, "int8", lambda: judge, None, HOST, Remarks())
    found = {each.name: each for each in given}
    waiting = {name for name, each in found.items() if each.later is not None}
    assert waiting == {"inductor (int8)", "ort (int8)"}
    assert not any("openvino" in name for name in found)  # no product of this graph is one of codes
    found["ort (int8)"].make()
    assert found["ort (int8)"].copies
    assert found["ort (int8)"].judge is judge
