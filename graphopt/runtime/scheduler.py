"""The scheduler: runs a Plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.runtime.plan import Plan, Value


def run(plan: Plan, inputs: Sequence[torch.Tensor]) -> list[Any]:
    """Run a plan's steps in order, letting go of every value after its last reader.

    Args:
        plan: the plan.
        inputs: tensors in the plan's input order, on the plan's device.

    Returns:
        The flat outputs, in order.
    """
    plan = plan.serving(inputs)
    values: dict[str, Any] = dict(zip(plan.inputs, inputs, strict=True))
    values.update(plan.constants)
    for step in plan.steps:
        results = step.program.run([values[name] for name in step.region.reads])
        values.update(zip(step.region.writes, results, strict=True))
        for name in step.frees:
            values.pop(name, None)
    return [values[end.name] if isinstance(end, Value) else end for end in plan.outputs]
