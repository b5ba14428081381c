"""Plans run in order and side by side: right answers, failures without hangs, no thread left behind."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch

from graphopt.capture.export import capture
from graphopt.compiler.remarks import Remarks
from graphopt.errors import ExecutionError, LoweringError
from graphopt.runtime import partition, scheduler
from graphopt.runtime.measure import Timing
from graphopt.runtime.ort_options import OrtOptions
from graphopt.runtime.plan import Plan
from graphopt.runtime.scheduling import arrange, lanes
from graphopt.runtime.scheduling.arrange import arranged, with_lanes
from graphopt.runtime.scheduling.lanes import Lanes
from graphopt.runtime.scheduling.tasks import plan_tasks
from graphopt.runtime.target import Target
from tests._models import randn, randomised
from tests.runtime.scheduling._plans import CPU, Program, diamond, plan, step

X = torch.ones(4)


@pytest.fixture(autouse=True)
def _no_thread_is_leaked() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def beside(made: Plan, *numbers: int) -> Plan:
    return with_lanes(made, numbers, max(numbers) + 1)


# In order


def chain(length: int) -> Plan:
    names = ["x", *(f"s{n}" for n in range(length))]
    steps = [step(name, [source], lambda x: x) for source, name in pairwise(names)]
    return plan(*steps, outputs=[names[-1]])


def calls_of(run: Callable[[], object]) -> int:
    """How many functions are called, Python's and C's."""
    count = 0

    def on(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_a_step_in_order_costs_a_handful_of_calls() -> None:
    """Work is counted, which a busy machine cannot change; `python -m bench serve` tells the microseconds."""
    few, many = chain(10), chain(110)
    a_step = (calls_of(lambda: scheduler.run(many, [X])) - calls_of(lambda: scheduler.run(few, [X]))) / 100
    assert a_step <= 10


def test_a_chain_and_a_single_step_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(arrange, "step_seconds", lambda plan, inputs: 1 / 0)  # nothing is even timed
    for made in (chain(1), chain(5)):
        assert arranged(made, [X], Remarks(), lambda outputs: True) is made


def test_an_error_says_which_step_it_comes_from() -> None:
    made = diamond(lambda x: x + 1, lambda x: x.view(3))
    with pytest.raises(RuntimeError, match="invalid for input") as error:
        scheduler.run(made, [X])
    assert error.value.__notes__ == ["in step right of the plan, on hand"]


# Side by side


def test_branches_run_at_the_same_time_and_the_answer_is_the_same() -> None:
    meeting = threading.Barrier(2)

    def meets(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            meeting.wait(30)  # each waits for the other: in order, they would never meet
            return factor * x

        return run

    made = beside(diamond(meets(2.0), meets(3.0)), 0, 0, 1, 0)
    for _ in range(3):
        end, left = scheduler.run(made, [X])
        assert torch.equal(end, -2 * X)
        assert torch.equal(left, 4 * X)
    assert [row.get("lane") for row in made.rows()] == [0, 0, 1, 0]


def test_values_are_let_go_of_after_their_last_reader() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def left(x: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(x))
        return 2 * x

    made = plan(
        step("top", ["x"], lambda x: x + 1),
        step("left", ["top"], left),
        step("right", ["top"], lambda x: 3 * x),
        step("end", ["left", "right"], lambda a, b: a - b),
        step("later", ["end"], lambda x: x if seen[0]() is None else 1 / 0),
        outputs=["later"],
    )
    assert torch.equal(scheduler.run(beside(made, 0, 0, 1, 0, 1), [X])[0], -2 * X)


def test_many_threads_share_the_lanes() -> None:
    made = beside(diamond(lambda x: 2 * x, lambda x: 3 * x), 0, 1, 2, 0)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: scheduler.run(made, [n * X]), range(200)))
    for n, (end, left) in enumerate(results):
        assert torch.equal(end, -(n + 1) * X)
        assert torch.equal(left, 2 * (n + 1) * X)


def test_lanes_have_their_share_of_the_cores_and_leave_the_callers_alone() -> None:
    found: list[int] = []
    own = torch.get_num_threads()
    try:
        torch.set_num_threads(4)

        def note(x: torch.Tensor) -> torch.Tensor:
            found.append(torch.get_num_threads())
            return x

        scheduler.run(beside(diamond(note, note), 0, 0, 1, 0), [X])
        assert found == [2, 2]
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(own)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a way to choose cores")
def test_lanes_have_cores_of_their_own_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    every = os.sched_getaffinity(0)
    found: dict[str, set[int]] = {}

    def note(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            found[name] = os.sched_getaffinity(0)
            return x

        return run

    made = diamond(note("left"), note("right"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    scheduler.run(beside(made, 0, 0, 1, 0), [X])
    one, other = found["left"], found["right"]
    if len(every) > 1:
        assert len(one) == len(other) == 1
        assert one != other
    assert os.sched_getaffinity(0) == every  # the caller's
    scheduler.run(beside(made, *range(4)), [X])
    assert len(every) >= 4 or found["left"] == every  # too few: no lane is held to any


# ONNX Runtime


class Branches(torch.nn.Module):
    """Two products of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.left(x)), torch.tanh(self.right(x))


def branches(x: torch.Tensor) -> Plan:
    """Each branch a region of ONNX Runtime, in a session of four threads."""
    target = Target(CPU, OrtOptions(intra_op_threads=4))
    graph = capture(randomised(Branches()), (x,))
    found = partition.cut(graph, partition.find_executors(("ort",)), target, Remarks())
    units = {unit.nodes[0].name: index for index, unit in enumerate(found.units)}
    groups = [("ort", [units[one], units[two]]) for one, two in (("linear", "tanh"), ("linear_1", "tanh_1"))]
    return partition.compiled(dataclasses.replace(found, groups=groups), target, Remarks(), "fast")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs a list of the process's threads")  # noqa: PTH112
def test_sessions_in_lanes_have_the_lanes_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of four threads each in two lanes of two would be eight threads on four cores."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208

    x = randn(4, 32)
    made = branches(x)
    wanted = scheduler.run(made, [x])
    before = threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    split = with_lanes(made, (0, 1), 2)
    assert [step.program.threads for step in split.steps] == [2, 2]
    assert [step.program.threads for step in made.steps] == [4, 4]
    assert threads() - before == 2 + 2  # a lane's, and one more for its session
    for found, want in zip(scheduler.run(split, [x]), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    alone = made.steps[0].program
    assert alone.with_threads(4) is alone


def test_a_session_that_cannot_be_had_with_fewer_threads_leaves_the_plan_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stubborn(Program):
        def with_threads(self, threads: int) -> Program:
            raise LoweringError("there is no other session")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(arrange, "step_seconds", lambda plan, inputs: [0.001, 0.01, 0.01, 0.001])
    made = diamond(lambda x: 2 * x, lambda x: 3 * x)
    stubborn = dataclasses.replace(made.steps[1], program=Stubborn(lambda x: 2 * x))
    made = dataclasses.replace(made, steps=(made.steps[0], stubborn, *made.steps[2:]))
    remarks = Remarks()
    assert arranged(made, [X], remarks, lambda outputs: True) is made
    assert [row.reason for row in remarks.rows] == ["steps run in order: there is no other session"]


# Failures


def test_a_step_that_fails_ends_the_call_and_the_steps_after_it_do_not_run() -> None:
    ran: list[str] = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("in the middle")

    def note(name: str) -> Callable[..., torch.Tensor]:
        def run(*values: torch.Tensor) -> torch.Tensor:
            ran.append(name)
            return values[0]

        return run

    made = plan(
        step("bad", ["x"], fails),
        step("other", ["bad"], note("other")),
        step("join", ["other"], note("join")),
        outputs=["join"],
    )
    made = beside(made, 0, 1, 0)
    for _ in range(2):  # the lanes live on
        with pytest.raises(ValueError, match="in the middle") as error:
            scheduler.run(made, [X])
    assert error.value.__notes__ == ["in step bad of the plan, on hand"]
    assert ran == []


def test_a_thread_that_dies_is_an_error_and_the_next_call_runs_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "_LOOK_S", 0.01)
    entered, leave = threading.Event(), threading.Event()

    def waits(x: torch.Tensor) -> torch.Tensor:
        if not leave.is_set():
            entered.set()
            assert leave.wait(30)
        return x

    made = beside(diamond(lambda x: 2 * x, waits), 0, 0, 1, 0)
    assert isinstance(made.runner, Lanes)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(scheduler.run, made, [X])
        assert entered.wait(30)
        made.runner._workers[1].stop()  # it ends before the job that comes next
        second = pool.submit(scheduler.run, made, [X])
        while made.runner._workers[1]._jobs.qsize() < 2:
            assert not second.done()
        leave.set()
        assert torch.equal(first.result(30)[0], 2 * X)
        with pytest.raises(ExecutionError, match="the thread of lane 1 died"):
            second.result(30)
    assert torch.equal(scheduler.run(made, [X])[0], 2 * X)


# When


def test_side_by_side_is_chosen_where_it_is_right_and_measured_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made = diamond(lambda x: 2 * x, lambda x: 3 * x)
    monkeypatch.setattr(arrange, "step_seconds", lambda plan, inputs: [0.001, 0.01, 0.01, 0.001])
    for ms, right, lanes_found in (
        ((20, 12), True, (0, 0, 1, 1)),
        ((20, 19.9), True, ()),
        ((20, 12), False, ()),
    ):
        timings = [Timing(one - 0.1, one, one + 0.1, 5) for one in ms]
        monkeypatch.setattr(arrange, "interleaved", lambda runs, timings=timings, **_: timings)
        remarks = Remarks()
        found = arranged(made, [X], remarks, lambda outputs, right=right: right)
        assert found.lanes == lanes_found
        assert len(remarks.rows) == right
    monkeypatch.setattr(arrange, "step_seconds", lambda plan, inputs: [0.02, 0.01, 1e-5, 0.02])
    assert arranged(made, [X], Remarks(), lambda outputs: 1 / 0) is made  # simulated, and not worth running


def test_a_plan_as_tasks() -> None:
    graph = plan_tasks(diamond(lambda x: x, lambda x: x), [1.0, 2.0, 3.0, 4.0], "cpu")
    assert graph.tasks["end"].reads == {"left": 16.0, "right": 16.0}
    assert graph.tasks["left"].seconds == {"cpu": 2.0}
    assert graph.critical_path("cpu") == ["top", "right", "end"]
