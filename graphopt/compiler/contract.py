"""What the callers of a graph rely on: its inputs, types and sizes, and who owns the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.compiler.cost import VIEWS
from graphopt.compiler.remarks import Remarks
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, same_shape

aten = torch.ops.aten


class Contract:
    """The face of a graph, to hold the graph against after a pass.

    Args:
        graph: the graph before the pass.
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes = fingerprint(graph)
        self._inputs = [node.name for node in graph.placeholders]
        self._outputs = [_type(result) for result in _results(graph)]

    def broken_by(self, graph: Graph) -> str | None:
        """How the graph no longer keeps the contract, or None when it does."""
        inputs = [node.name for node in graph.placeholders]
        if inputs != self._inputs:
            return f"the inputs were {self._inputs} and became {inputs}"
        outputs = [_type(result) for result in _results(graph)]
        if len(outputs) != len(self._outputs):
            return f"there were {len(self._outputs)} outputs and there are {len(outputs)}"
        for index, (before, after) in enumerate(zip(self._outputs, outputs, strict=True)):
            if before[:-1] != after[:-1] or not same_shape(before[-1], after[-1]):
                return f"output {index} was {_written(before)} and became {_written(after)}"
        return None


def fingerprint(graph: Graph) -> int:
    """A number that changes when a node is added, erased, rewired or called differently."""
    rows = [
        (id(node), node.name, id(node.target), tuple(map(id, node.all_input_nodes)), len(node.args))
        for node in graph.fx.nodes
    ]
    return hash((tuple(rows), tuple(map(id, _results(graph)))))


def own_outputs(graph: Graph, captured: Graph, remarks: Remarks) -> None:
    """Copy each output that shares memory with an input, a weight or another output, and did not as captured.

    Inside a graph nobody can tell a view from a copy, and ``x + 0`` is ``x``. A caller can, who writes to the
    result and finds the input, or the model, changed.
    """
    allowed = _shared_memory(captured)
    results = list(_results(graph))
    for index, owner in sorted(_shared_memory(graph) - allowed):
        result = results[index]
        with graph.fx.inserting_before(graph.output):
            results[index] = graph.call(aten.clone.default, (result,), {}, provenance.of(result))
        remarks.add(
            "analysis", "own_outputs", result, f"output {index} is copied: it shares memory with {owner}"
        )
    graph.output.args = (tuple(results),)


def _results(graph: Graph) -> tuple[Any, ...]:
    results: Any = graph.output.args[0]
    return tuple(results)


def _type(result: Any) -> tuple[Any, ...]:
    val = result.meta.get("val") if isinstance(result, fx.Node) else result
    if isinstance(val, torch.Tensor):
        return val.dtype, val.device, val.shape
    return type(val), ()


def _written(kind: tuple[Any, ...]) -> str:
    *what, shape = kind
    return f"{what[0]} {list(shape)}" if len(what) > 1 else str(what[0].__name__)


def _memory(node: fx.Node) -> fx.Node:
    """The node whose memory a value is a view of: itself, where it is none."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _shared_memory(graph: Graph) -> set[tuple[int, str]]:
    """Pairs of an output's index and whose memory it is: an input's, a constant's, or an earlier output's."""
    owners: dict[fx.Node, int] = {}
    shared = set()
    for index, result in enumerate(_results(graph)):
        if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), torch.Tensor):
            continue
        owner = _memory(result)
        if owner.op == "placeholder":
            shared.add((index, f"input {owner.name}"))
        elif owner.op == "get_attr":
            sources = graph.constants[str(owner.target)].sources
            shared.add((index, f"the constant {' + '.join(sources) or owner.target}"))
        elif owner in owners:
            shared.add((index, f"output {owners[owner]}"))
        owners.setdefault(owner, index)
    return shared
