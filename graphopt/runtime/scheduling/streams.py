"""A plan's steps side by side: on streams of one GPU, and over several devices, with copies beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.runtime.plan import Plan, Step, Value
from graphopt.runtime.transfer import Transfer

Queue = tuple[torch.device, int | str]  # a GPU and a lane of steps, or the copies "in" or "out"


class Streams:
    """Queues a plan's steps on the streams of their devices and lanes, in the plan's order.

    Lane 0 of the plan's own GPU is the caller's current stream; every other lane, and every other GPU, has a
    stream, and a GPU has one for copies to it and one for copies from it, so that copies run beside kernels.
    A step waits on its GPU for what it reads of other streams, and the allocator is told of every stream that
    reads another's tensor, so that its memory is not given away before that has run. A step on the CPU makes
    the host wait, for no more than what it reads. A plan does well to name the steps of GPUs first where it
    may.

    Args:
        plan: the plan; its steps say where they run, its lanes which of them run in order.
        cuda: ``torch.cuda``.
    """

    def __init__(self, plan: Plan, cuda: Any = torch.cuda) -> None:
        self._plan, self._cuda = plan, cuda
        self._home: Queue | None = (plan.device, 0) if plan.device.type == "cuda" else None
        lanes = plan.lanes or (0,) * len(plan.steps)
        self._queues = [
            _queues(step, lane, plan.device) for step, lane in zip(plan.steps, lanes, strict=True)
        ]
        others = {queue for queues in self._queues for queue in queues if queue != self._home}
        in_order = sorted(others, key=lambda queue: tuple(map(str, queue)))
        self._streams = {queue: cuda.Stream(queue[0]) for queue in in_order}
        placed = list(zip(plan.steps, self._queues, strict=True))
        self._made_on: dict[str, Queue | None] = {
            name: queues[-1] if queues else None for step, queues in placed for name in step.region.writes
        }
        self._foreign = [
            [
                name
                for name in dict.fromkeys(step.region.reads)
                if self._made_on.get(name, self._home) != (queues[0] if queues else None)
            ]
            for step, queues in placed
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
                used = [streams[queue] for queue in self._queues[index]]
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
            if caller is None or not isinstance(end, Value):
                continue
            if self._made_on.get(end.name, self._home) != self._home:
                _lend(values[end.name], caller)
        return plan.ends(values)

    def _await(self, index: int, used: Sequence[Any], values: dict[str, Any], ended: dict[str, Any]) -> None:
        """Let a step wait for what others make: its stream, or the host where it runs on the CPU."""
        for name in self._foreign[index]:
            if name in ended and used:
                used[0].wait_event(ended[name])
            elif name in ended:
                ended[name].synchronize()
            if used:
                _lend(values[name], used[0])

    def _launch(self, step: Step, used: Sequence[Any], values: dict[str, Any]) -> Sequence[Any]:
        with contextlib.ExitStack() as stack:
            for stream in used:
                stack.enter_context(self._cuda.stream(stream))
            return step.run([values[name] for name in step.region.reads])


def _queues(step: Step, lane: int, home: torch.device) -> list[Queue]:
    """What a step is queued on, that of its result last; nothing on the CPU."""
    device = step.device or home
    if not isinstance(step.program, Transfer):
        return [(device, lane)] if device.type == "cuda" else []
    way: tuple[Queue, ...] = ((step.program.source, "out"), (device, "in"))
    return [queue for queue in way if queue[0].type == "cuda"]


def _lend(value: Any, stream: Any) -> None:
    """Tell the allocator that a stream reads what was made on another."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)
