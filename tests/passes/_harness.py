"""Running passes over small programs: what every test of a pass asserts, whatever the pass does.

``run`` captures a program with re-drawn weights, runs passes through the pass manager, verification included,
and asserts of the result: it is well formed; its outputs are as near to float64 as the verifier wants; every
new node knows the user's source line and the captured nodes that it was made from; no rewrite was reverted; a
second run changes nothing. A test adds what its pass should have done: ``becomes``, ``refuses`` or ``stays``.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

import graphopt.kernels  # noqa: F401  (registers the ops)
from graphopt.capture.export import capture
from graphopt.compiler.compare import compare
from graphopt.compiler.device import Limits
from graphopt.compiler.evaluate import evaluate
from graphopt.compiler.manager import Outcome, PassManager
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.remarks import Remark, Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, op_name
from tests._models import randomised

LIMITS = Limits("test", flops_per_s=1e12, bytes_per_s=1e11)
SILENT = {"device", "pin_memory", "layout"}  # arguments that say nothing about what is computed


def program(forward: Callable[..., Any], **weights: torch.Tensor | nn.Module | float) -> nn.Module:
    """A model out of one function of (model, inputs); weights become parameters, integer tensors buffers."""
    code = forward.__code__.replace(
        co_name="forward"
    )  # export records the lines of functions of this name only
    named = FunctionType(code, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    model = type("Program", (nn.Module,), {"forward": named})()
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter):
            model.register_buffer(name, weight)
        else:
            setattr(model, name, weight)
    return model.eval()


@dataclass
class Ran:
    """A program before and after the passes."""

    model: nn.Module
    passes: Sequence[Pass]
    captured: Graph
    graph: Graph
    outcome: Outcome
    remarks: Remarks
    inputs: list[torch.Tensor]
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.names = tuple(rule.name for rule in self.passes)

    @property
    def kept(self) -> dict[str, int]:
        """How many rewrites each pass made."""
        counts: dict[str, int] = {}
        for rewrite in self.outcome.kept:
            counts[rewrite.pass_name] = counts.get(rewrite.pass_name, 0) + 1
        return counts

    def becomes(self, expected: str, before: str | None = None) -> Ran:
        """The graph is what stands there, op for op and wire for wire; so was the captured one, if given."""
        if before is not None:
            assert text(self.captured) == textwrap.dedent(before).strip()
        assert text(self.graph) == textwrap.dedent(expected).strip()
        assert self.kept
        return self

    def counts(self, **expected: int) -> Ran:
        """So many calls of each op, by its name without the namespace."""
        found = {name.split(".")[-1]: count for name, count in self.graph.op_counts().items()}
        assert {name: found.get(name, 0) for name in expected} == expected, text(self.graph)
        return self

    def stays(self) -> Ran:
        """The last pass changed nothing."""
        assert self.names[-1] not in self.kept, text(self.graph)
        if len(self.passes) == 1:
            assert text(self.graph) == text(self.captured)
        return self

    def refuses(self, reason: str) -> Ran:
        """Nor did it pass in silence: a remark says why not, and at which of the user's lines."""
        self.stays()
        missed = [row for row in self.remarks.of_kind("missed") if row.pass_name == self.names[-1]]
        fitting = [row for row in missed if re.search(reason, row.reason)]
        assert fitting, [row.reason for row in missed]
        for row in fitting:
            self._is_the_users_line(row)
        return self

    def _is_the_users_line(self, row: Remark) -> None:
        file, _, line = row.source.rpartition(":")
        assert int(line) > 0
        if "transformers" not in Path(file).parts:
            source, first = inspect.getsourcelines(type(self.model).forward)
            assert file == inspect.getsourcefile(type(self.model).forward)
            assert first <= int(line) < first + len(source)

    def agrees(self, *inputs: torch.Tensor) -> Ran:
        """Captured and rewritten graph agree on other inputs, of other sizes where they are dynamic."""
        paths = [spec.path for spec in self.captured.inputs if spec.node is not None]
        with torch.no_grad():
            own = (
                self.model(*inputs)
                if paths[0].startswith("args")
                else self.model(**dict(zip(paths, inputs, strict=True)))
            )
        own = [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, torch.Tensor)]
        _assert_as_exact(self.captured, self.graph, inputs, own)
        return self


def run(
    passes: Pass | Sequence[Pass],
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
    redraw: bool = True,
) -> Ran:
    """Capture the model and run the passes over it; asserts what holds for every pass (see above)."""
    if redraw:
        randomised(model)
    passes = [passes] if isinstance(passes, Pass) else passes
    captured = capture(model, args, kwargs, dynamic=dynamic)
    leaves = pytree.tree_leaves((args, dict(kwargs or {})))
    inputs = [leaf for spec, leaf in zip(captured.inputs, leaves, strict=True) if spec.node is not None]
    ran = rerun(passes, model, captured, inputs)
    again = PassManager(passes, Remarks(), LIMITS).run(ran.graph.clone(), inputs)
    assert [(row.pass_name, row.site) for row in again.rewrites] == []
    assert text(again.graph) == text(ran.graph)
    return ran


def rerun(passes: Sequence[Pass], model: nn.Module, captured: Graph, inputs: list[torch.Tensor]) -> Ran:
    """Run the passes over a clone of a captured graph."""
    graph, remarks = captured.clone(), Remarks()
    outcome = PassManager(passes, remarks, LIMITS).run(graph, inputs)
    broken = [row for row in remarks.rows if row.reason.startswith(("undone", "reverted"))]
    assert not broken, broken
    assert outcome.rewrites == outcome.kept
    outcome.graph.check()
    _assert_as_exact(captured, outcome.graph, inputs)
    _assert_provenance(captured, outcome.graph)
    return Ran(model, passes, captured, outcome.graph, outcome, remarks, inputs)


def results(graph: Graph, inputs: Sequence[torch.Tensor], *, float64: bool = False) -> list[Any]:
    """The graph's outputs for flat tensor inputs."""
    given = dict(zip(graph.placeholders, inputs, strict=True))
    outputs = [node for node in pytree.tree_leaves(graph.output.args[0]) if isinstance(node, fx.Node)]
    return evaluate(graph, outputs, given, float64=float64)


def _assert_as_exact(
    captured: Graph, graph: Graph, inputs: Sequence[torch.Tensor], before: list[Any] | None = None
) -> None:
    before = results(captured, inputs) if before is None else before
    found = compare(before, results(graph, inputs), results(captured, inputs, float64=True), MODEL_FLOOR_ULPS)
    assert found.ok, found.reason


def _assert_provenance(captured: Graph, graph: Graph) -> None:
    known = {node.name for node in captured.nodes}
    for node in graph.calls:
        place = provenance.of(node)
        assert place.origins, node.format_node()
        assert known.issuperset(place.origins), place
        if node.name not in known:
            assert place.file, node.format_node()
            assert place.line, node.format_node()
            assert Path(place.file).suffix == ".py"


def text(graph: Graph) -> str:
    """The graph as lines ``%1 = op(%0, weight, 2)``; constants by the model's names and how they are made."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        elif node.op == "get_attr":
            constant = graph.constants[str(node.target)]
            sources = ", ".join(constant.sources)
            names[node] = f"<{constant.how}: {sources}>" if constant.how else sources
        elif node.op == "call_function":
            names[node] = f"%{len(lines)}"
            lines.append(f"{names[node]} = {op_name(node).removeprefix('aten.')}({_arguments(node, names)})")
    returned = [_written(value, names) for value in graph.output.args[0]]  # type: ignore[union-attr]
    return "\n".join([*lines, f"return {', '.join(returned)}"])


def _arguments(node: fx.Node, names: dict[fx.Node, str]) -> str:
    positional = [_written(value, names) for value in node.args]
    named = [f"{key}={_written(value, names)}" for key, value in node.kwargs.items() if key not in SILENT]
    return ", ".join([*positional, *named])


def _written(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(item, names) for item in value)}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).removeprefix("torch.") if value != 2**63 - 1 else "end"
