"""A plan over several devices: each step on its device's stream, copies on streams of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.runtime.plan import Plan, Step, Value
from graphopt.runtime.scheduling.streams import lend
from graphopt.runtime.transfer import Transfer

Lane = tuple[torch.device, str]  # a GPU, and what for: "compute", "in" or "out"


class Devices:
    """Queues a plan's steps on the streams of their devices, in the plan's order.

    Work of the plan's own GPU is queued on the caller's current stream; every other GPU has a stream, and
    every GPU one for copies to it and one for copies from it, so that copies run beside kernels. A step on a
    GPU waits there for what it reads; one on the CPU makes the host wait, for no more than what it reads. A
    plan does well to name the steps of GPUs first where it may.

    Args:
        plan: the plan; its steps say where they run.
        cuda: ``torch.cuda``.
    """

    def __init__(self, plan: Plan, cuda: Any = torch.cuda) -> None:
        self._plan, self._cuda = plan, cuda
        self._home: Lane | None = (plan.device, "compute") if plan.device.type == "cuda" else None
        self._lanes = [_lanes(step, plan.device) for step in plan.steps]
        others = {lane for lanes in self._lanes for lane in lanes if lane != self._home}
        self._streams = {lane: cuda.Stream(lane[0]) for lane in sorted(others, key=str)}
        self._made_on: dict[str, Lane | None] = {
            name: lanes[-1] if lanes else None
            for step, lanes in zip(plan.steps, self._lanes, strict=True)
            for name in step.region.writes
        }
        self._foreign = [
            [
                name
                for name in dict.fromkeys(step.region.reads)
                if self._made_on.get(name, self._home) != (lanes[0] if lanes else None)
            ]
            for step, lanes in zip(plan.steps, self._lanes, strict=True)
        ]
        read_elsewhere = {name for names in self._foreign for name in names}
        self._records = [not read_elsewhere.isdisjoint(step.region.writes) for step in plan.steps]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Queue the plan after what the caller's stream holds, and later work there after the plan.

        Where the model is on the CPU, its outputs are there when this returns.
        """
        plan = self._plan
        streams, caller = dict(self._streams), None
        if self._home is not None:
            caller = streams[self._home] = self._cuda.current_stream(plan.device)
            begun = caller.record_event()
            for stream in self._streams.values():
                stream.wait_event(begun)
        values: dict[str, Any] = dict(zip(plan.inputs, inputs, strict=True))
        values.update(plan.constants)
        ended: dict[str, Any] = {}
        try:
            for index, step in enumerate(plan.steps):
                used = [streams[lane] for lane in self._lanes[index]]
                self._await(index, used, values, ended)
                results = self._launch(step, used, values)
                if used and self._records[index]:
                    ended.update(dict.fromkeys(step.region.writes, used[-1].record_event()))
                values.update(zip(step.region.writes, results, strict=True))
                for name in step.frees:
                    values.pop(name, None)
        finally:  # whatever was queued reads what the caller owns
            for stream in self._streams.values():
                if caller is None:
                    stream.synchronize()
                else:
                    caller.wait_stream(stream)
        for end in plan.outputs:
            if caller is not None and isinstance(end, Value) and self._made_on.get(end.name) != self._home:
                lend(values[end.name], caller)
        return plan.ends(values)

    def _await(self, index: int, used: Sequence[Any], values: dict[str, Any], ended: dict[str, Any]) -> None:
        """Let a step wait for what others make: its stream, or the host where it runs on the CPU."""
        for name in self._foreign[index]:
            if name in ended and used:
                used[0].wait_event(ended[name])
            elif name in ended:
                ended[name].synchronize()
            if used:
                lend(values[name], used[0])

    def _launch(self, step: Step, used: Sequence[Any], values: dict[str, Any]) -> Sequence[Any]:
        with contextlib.ExitStack() as stack:
            for stream in used:
                stack.enter_context(self._cuda.stream(stream))
            return step.run([values[name] for name in step.region.reads])


def _lanes(step: Step, home: torch.device) -> list[Lane]:
    """The streams that a step is queued on, that of its result last; none on the CPU."""
    device = step.device or home
    if not isinstance(step.program, Transfer):
        return [(device, "compute")] if device.type == "cuda" else []
    way = ((step.program.source, "out"), (device, "in"))
    return [lane for lane in way if lane[0].type == "cuda"]
