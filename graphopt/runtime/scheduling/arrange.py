"""Whether steps run side by side: a simulation says where it may pay, a measurement whether it does."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import torch

from graphopt.compiler.remarks import Remarks
from graphopt.errors import LoweringError
from graphopt.runtime import scheduler
from graphopt.runtime.measure import interleaved
from graphopt.runtime.plan import Plan
from graphopt.runtime.scheduling.lanes import Lanes
from graphopt.runtime.scheduling.lists import list_schedule
from graphopt.runtime.scheduling.streams import Streams
from graphopt.runtime.scheduling.tasks import Device, Machine, plan_tasks

_STREAMS = 4  # lanes on a GPU, at most
_WORTH = 0.95  # of the time in order that side by side may take, for it to be chosen
_HANDOVER_S = 50e-6  # of a value to another lane; a thread's wake-up on the CPU
_RUNS, _SECONDS = 3, 1.0


def arranged(
    plan: Plan, inputs: Sequence[torch.Tensor], remarks: Remarks, is_right: Callable[[list[Any]], bool]
) -> Plan:
    """The plan with lanes, where its steps are faster side by side; otherwise the plan.

    A plan over several devices is arranged already.

    Args:
        plan: in order; it has run.
        inputs: the example inputs: flat tensors.
        remarks: takes what was found.
        is_right: judges flat outputs: with other threads, sums are added in another order.
    """
    on_gpu = plan.device.type == "cuda"
    lanes = _STREAMS if on_gpu else torch.get_num_threads()
    if plan.runner is not None or lanes < 2 or len(plan.steps) < 2:
        return plan
    kind = plan.device.type
    if plan_tasks(plan, [0.0] * len(plan.steps), kind).is_chain:
        return plan
    seconds = step_seconds(plan, inputs)
    tasks = plan_tasks(plan, seconds, kind)
    lanes = min(lanes, max(len(level) for level in nx.topological_generations(tasks.graph)))
    machine = Machine(tuple(Device(str(lane), kind) for lane in range(lanes)), latency_s=_HANDOVER_S)
    schedule = list_schedule(tasks, machine)
    if schedule.makespan > _WORTH * sum(seconds):
        return plan
    on = {placed.task: int(placed.device) for placed in schedule.placements}
    try:
        beside = with_lanes(plan, [on[step.region.name] for step in plan.steps], lanes)
    except LoweringError as error:
        remarks.add("missed", "scheduler", None, f"steps run in order: {error.message}")
        return plan
    if not is_right(scheduler.run(beside, inputs)):
        return plan
    runs = [lambda: scheduler.run(plan, inputs), lambda: scheduler.run(beside, inputs)]
    before, after = interleaved(runs, seconds=_SECONDS, device=plan.device)
    faster = after.median_ms <= _WORTH * before.median_ms
    remarks.add(
        "analysis",
        "scheduler",
        None,
        f"{len(plan.steps)} steps on {lanes} lanes take {after.median_ms:.2f} ms, in order"
        f" {before.median_ms:.2f} ms: they run {'side by side' if faster else 'in order'}",
    )
    return beside if faster else plan


def with_lanes(plan: Plan, lanes: Sequence[int], count: int) -> Plan:
    """The plan, its steps on lanes: streams of a GPU, or threads of a CPU that share its cores.

    On a CPU the steps' programs become those of ``Lanes``, with no more threads than a lane has.

    Args:
        plan: the plan.
        lanes: of each step, 0 and up.
        count: of lanes that share the cores.

    Raises:
        LoweringError: a program cannot be had with the threads of a lane.
    """
    numbers = {lane: number for number, lane in enumerate(dict.fromkeys(lanes))}
    bare = dataclasses.replace(plan, lanes=tuple(numbers[lane] for lane in lanes))
    if plan.device.type == "cuda":
        return dataclasses.replace(bare, runner=Streams(bare))
    runner = Lanes(bare, max(1, torch.get_num_threads() // count))
    return dataclasses.replace(runner.plan, runner=runner)


def step_seconds(plan: Plan, inputs: Sequence[torch.Tensor]) -> list[float]:
    """What each step takes in order, in seconds: the median of a few runs, waiting for a GPU after each."""
    rows = []
    for _ in range(_RUNS):
        times: list[float] = []
        values = dict(zip(plan.inputs, inputs, strict=True)) | plan.constants
        for step in plan.steps:
            start = time.perf_counter()
            results = step.run([values[name] for name in step.region.reads])
            if plan.device.type == "cuda":
                torch.cuda.synchronize(plan.device)
            times.append(time.perf_counter() - start)
            values.update(zip(step.region.writes, results, strict=True))
        rows.append(times)
    return [statistics.median(column) for column in zip(*rows, strict=True)]
