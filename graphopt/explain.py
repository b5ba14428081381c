"""Why a model's graph becomes what it becomes: the passes alone, nothing lowered and nothing timed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import graphopt.kernels  # noqa: F401  (registers the ops)
from graphopt.capture.export import capture_any
from graphopt.capture.inputs import Dynamic
from graphopt.capture.outputs import Outputs, select
from graphopt.compiler.cost import graph_milliseconds
from graphopt.compiler.device import Limits, device_limits, gpu_limits
from graphopt.compiler.manager import PassManager
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.remarks import Remarks
from graphopt.ir.graph import Graph
from graphopt.observe.explanation import Explanation
from graphopt.passes.default import pipeline
from graphopt.runtime.target import Target


@dataclass(frozen=True)
class Problem:
    """A captured model with everything that the passes need.

    Args:
        model: class name of the model.
        graph: as captured.
        inputs: example inputs: flat tensors in placeholder order.
        passes: in order.
        limits: of the target.
    """

    model: str
    graph: Graph
    inputs: list[torch.Tensor]
    passes: list[Pass]
    limits: Limits


def problem(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "auto",
    dynamic: Dynamic = None,
    outputs: Outputs = None,
    level: int = 2,
    enable: Iterable[str] = (),
    disable: Collection[str] = (),
) -> Problem:
    """Capture a model for a run of the passes; the arguments are those of ``explain``."""
    graph, inputs = capture_any(model, args, kwargs, dynamic=dynamic)
    select(graph, outputs)
    passes = [rule for rule in pipeline(level, enable, disable) if rule.exact]
    return Problem(type(model).__name__, graph, inputs, passes, _limits(target, inputs))


def explain(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "auto",
    dynamic: Dynamic = None,
    outputs: Outputs = None,
    level: int = 2,
    enable: Iterable[str] = (),
    disable: Collection[str] = (),
) -> Explanation:
    """Run the passes over a model, and say what was done, what was not, why, and what that is worth.

    Args:
        model: as for ``optimize``.
        args: as for ``optimize``.
        kwargs: as for ``optimize``.
        target: the device that prices are for: ``"auto"``, ``"cpu"``, ``"cuda"``, or the name of a GPU that
            need not be there: ``"h100"``, ``"h200"``, ``"a100"``, ``"l4"``.
        dynamic: as for ``optimize``.
        outputs: as for ``optimize``.
        level: as for ``optimize``.
        enable: as for ``optimize``; passes that lose something are left out.
        disable: as for ``optimize``.

    Raises:
        CaptureError: the model cannot be captured.
        InputError: example inputs are missing or do not fit.
        PassError: a pass is unknown.
        TargetError: the target is unknown.
    """
    given = problem(
        model, args, kwargs, target=target, dynamic=dynamic, outputs=outputs, level=level, enable=enable,
        disable=disable,
    )  # fmt: skip
    remarks = Remarks()
    graph = PassManager(given.passes, remarks, given.limits).run(given.graph.clone(), given.inputs).graph
    return Explanation(
        given.model,
        given.limits.name,
        remarks.rows,
        len(given.graph.calls),
        len(graph.calls),
        graph_milliseconds(given.graph, given.limits),
        graph_milliseconds(graph, given.limits),
    )


def _limits(target: str, inputs: list[torch.Tensor]) -> Limits:
    home = inputs[0].device if inputs else torch.device("cpu")
    if target == "auto" or target.partition(":")[0] in ("cpu", "cuda"):
        return device_limits(Target.of(target, home).device)
    return gpu_limits(target)
