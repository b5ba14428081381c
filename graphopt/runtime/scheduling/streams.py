"""A plan's steps side by side on a GPU: each lane a stream, ordered by events; the host waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.runtime.plan import Plan, Value


class Streams:
    """Queues a plan's steps on streams: lane 0 is the caller's current one.

    A step waits, on the GPU, for the steps of other lanes that it reads from. The allocator is told of every
    stream that reads a tensor of another, so that its memory is not given away before that has run.

    Args:
        plan: the plan; its lanes say which stream runs which step.
        cuda: ``torch.cuda``.
    """

    def __init__(self, plan: Plan, cuda: Any = torch.cuda) -> None:
        self._plan, self._cuda = plan, cuda
        self._streams = [cuda.Stream(plan.device) for _ in range(max(plan.lanes))]
        placed = list(zip(plan.steps, plan.lanes, strict=True))
        self._lane_of = {name: lane for step, lane in placed for name in step.region.writes}
        self._crossing = [
            {name for name in step.region.reads if self._lane_of.get(name, 0) != lane}
            for step, lane in placed
        ]
        read_elsewhere = set().union(*self._crossing)
        self._records = [not read_elsewhere.isdisjoint(step.region.writes) for step in plan.steps]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Queue the plan after what the caller's stream holds, and later work there after the plan."""
        plan = self._plan
        current = self._cuda.current_stream(plan.device)
        streams = [current, *self._streams]
        values: dict[str, Any] = dict(zip(plan.inputs, inputs, strict=True))
        values.update(plan.constants)
        begun = current.record_event()
        for stream in self._streams:
            stream.wait_event(begun)
        ended: dict[str, Any] = {}
        try:
            for index, (step, lane) in enumerate(zip(plan.steps, plan.lanes, strict=True)):
                stream = streams[lane]
                self._await(index, stream, values, ended)
                with self._cuda.stream(stream):
                    results = step.run([values[name] for name in step.region.reads])
                if self._records[index]:
                    ended.update(dict.fromkeys(step.region.writes, stream.record_event()))
                values.update(zip(step.region.writes, results, strict=True))
                for name in step.frees:
                    values.pop(name, None)
        finally:  # whatever was queued reads what the caller owns
            for stream in self._streams:
                current.wait_stream(stream)
        for end in plan.outputs:
            if isinstance(end, Value) and self._lane_of.get(end.name, 0):
                lend(values[end.name], current)
        return plan.ends(values)

    def _await(self, index: int, stream: Any, values: dict[str, Any], ended: dict[str, Any]) -> None:
        for name in sorted(self._crossing[index]):
            if name in ended:
                stream.wait_event(ended[name])
            lend(values[name], stream)


def lend(value: Any, stream: Any) -> None:
    """Tell the allocator that a stream reads what was made on another."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)
