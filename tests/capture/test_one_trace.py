"""A graph that is functional as export gives it needs one trace, and is the graph that two traces give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.capture import export
from graphopt.capture.export import capture
from graphopt.errors import CaptureError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph
from tests._models import FAMILIES, randn
from tests.capture._run import example_of
from tests.capture.test_export import Of

X = randn(2, 6, 4)

FUNCTIONAL: dict[str, Callable[[torch.Tensor], Any]] = {
    "reshape": lambda x: (x.reshape(2, -1) + 1).view(-1, 3).reshape(12, 4),
    "reshape of a transposed value": lambda x: x.transpose(0, 1).reshape(6, -1),
    "flatten": lambda x: x.flatten(1) + x.transpose(0, 1).flatten(1).reshape(2, 24),
    "chunk": lambda x: [part * 2 for part in x.chunk(4, dim=1)] + [*x.chunk(2, -1)],
    "contiguous": lambda x: x.transpose(0, 1).contiguous() + 1,
    "contiguous that is returned": lambda x: (x.transpose(0, 1).contiguous(), (x + 1).contiguous()),
    "dropout": lambda x: torch.dropout(x, 0.5, False) + 1,
    "dropout that is returned": lambda x: torch.dropout(x + 1, 0.5, False),
    "casts": lambda x: (
        x.half().float().double(),
        x.to(torch.float32),
        x.to("cpu"),
        x.to(device="cpu", dtype=torch.int64),
    ),
    "a copy": lambda x: x.clone() + x.to(torch.float32, copy=True),
    "a constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "batch norm": lambda x: nn.functional.batch_norm(x, torch.zeros(6), torch.ones(6)),
    "nobody reads": lambda x: (x.sum(), x + 1)[1],
    "no grad inside": lambda x: _without_grad(x) + 1,
}

OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda x: (x + 1).add_(2),
    "through a view": lambda x: _zero_first_row(x + 1),
    "dropout in training": lambda x: torch.dropout(x, 0.0, True),
    "an op spelled otherwise": lambda x: x.expand_as(x) + x.view_as(x),
}


def _without_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x * 2


def _zero_first_row(x: torch.Tensor) -> torch.Tensor:
    x[0].zero_()
    return x


def described(graph: Graph) -> list[tuple[Any, ...]]:
    """All of a graph but the names of its nodes: ops, arguments, values, and where they come from."""
    place = {node: f"%{index}" for index, node in enumerate(graph.fx.nodes)}
    return [
        (
            node.op,
            str(node.target) if node.op == "call_function" else "",
            str(fx.map_arg((node.args, node.kwargs), lambda source: place[source])),
            [_value(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))],
            provenance.of(node).source,
            provenance.of(node).module,
            provenance.of(node).module_type,
        )
        for node in graph.fx.nodes
    ]


def _value(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.device, leaf.requires_grad
    return leaf


def traces(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Graph, int]:
    """A capture, and how often it traced."""
    count, real = [1], ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, *args: Any, **kwargs: Any) -> ExportedProgram:
        count[0] += 1
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", counted)
        return capture(model, args, kwargs), count[0]


def assert_the_same(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *args: Any, **kwargs: Any) -> int:
    found, count = traces(monkeypatch, model, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(export, "is_functional", lambda graph: False)
        wanted, twice = traces(monkeypatch, model, *args, **kwargs)
    assert twice == 2
    assert described(found) == described(wanted)
    assert {k: c.sources for k, c in found.constants.items()} == {
        k: c.sources for k, c in wanted.constants.items()
    }
    found.check()
    return count


@pytest.mark.parametrize("label", FUNCTIONAL)
def test_one_trace_gives_the_graph_of_two(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_the_same(monkeypatch, Of(FUNCTIONAL[label]), X) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = example_of(family)
    assert_the_same(monkeypatch, example.model, *example.args, **example.kwargs)


@pytest.mark.parametrize("label", OTHERS)
def test_what_is_not_functional_is_traced_again(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, count = traces(monkeypatch, Of(OTHERS[label]), X)
    assert count == 2
    assert not any(
        getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in graph.calls
    )


def test_a_write_to_an_input_is_still_refused() -> None:
    with pytest.raises(CaptureError, match="writes its input"):
        capture(Of(lambda x: x.add_(1)), (X,))
