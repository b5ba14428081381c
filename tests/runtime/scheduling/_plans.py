"""Plans of programs made by hand, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from graphopt.runtime.executors._protocol import Silent
from graphopt.runtime.plan import Plan, Step, Value

CPU = torch.device("cpu")


class Program(Silent):
    """A function as a program."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        return [self._function(*inputs)]


def step(name: str, reads: Sequence[str], function: Callable[..., Any]) -> Step:
    """A step that makes one value, called as the step is."""
    node = SimpleNamespace(meta={"val": torch.empty(4)})
    graph = SimpleNamespace(calls=[], op_counts=dict)
    region = SimpleNamespace(name=name, reads=tuple(reads), writes=(name,), results=[node], graph=graph)
    return Step("hand", region, Program(function))  # type: ignore[arg-type]


def plan(*steps: Step, outputs: Sequence[str], device: torch.device = CPU) -> Plan:
    """A plan of one input, x."""
    return Plan(device, ("x",), tuple(map(Value, outputs)), {}, steps)


def diamond(left: Callable[..., Any], right: Callable[..., Any], device: torch.device = CPU) -> Plan:
    """x + 1, two branches of it, and their difference."""
    return plan(
        step("top", ["x"], lambda x: x + 1),
        step("left", ["top"], left),
        step("right", ["top"], right),
        step("end", ["left", "right"], lambda a, b: a - b),
        outputs=["end", "left"],
        device=device,
    )
