"""The scheduler: runs a Plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.runtime.plan import Plan
from graphopt.runtime.tokens import one_call


def run(plan: Plan, inputs: Sequence[torch.Tensor]) -> list[Any]:
    """Run a plan: as its runner does, or its steps in order, letting go of values after their last reader.

    Safe from several threads: programs are, and values belong to the call.

    Args:
        plan: the plan.
        inputs: tensors in the plan's input order, on the plan's device.

    Returns:
        The flat outputs, in order.
    """
    if plan.padded is None:
        return _run(plan, inputs)
    with one_call():
        return _run(plan.serving(inputs), inputs)


def _run(plan: Plan, inputs: Sequence[torch.Tensor]) -> list[Any]:
    if plan.runner is not None:
        return plan.runner.run(inputs)
    if plan.places is not None and len(inputs) == len(plan.inputs):
        given, made = plan.places  # nothing is named: a GPU that is idle waits for all of this
        results = plan.steps[0].run([inputs[place] for place in given])
        return [results[place] for place in made]
    values: dict[str, Any] = dict(zip(plan.inputs, inputs, strict=True))
    values.update(plan.constants)
    for step in plan.steps:
        results = step.run([values[name] for name in step.region.reads])
        values.update(zip(step.region.writes, results, strict=True))
        for name in step.frees:
            values.pop(name, None)
    return plan.ends(values)
