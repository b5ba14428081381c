"""Peak memory by accounting: weights, and the values alive at the same time, from shapes and lifetimes alone.

It is the same on every machine and in every run, so a change of it is a change of the model. What a process
really takes is measured beside it, in ``gate/serve.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from graphopt.compiler.cost import VIEWS
from graphopt.ir import provenance
from graphopt.ir.graph import Constant, Graph, is_getitem, op_name, tensor_bytes
from graphopt.observe.snapshot import tensors_of


def account(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Bytes of constants, of the values alive at the worst moment, and what the largest of these is.

    Args:
        graphs: the regions of a plan in order, or one whole graph; values are told apart by their names.
    """
    constants = {name: constant for graph in graphs for name, constant in graph.constants.items()}
    held = unique_bytes(constants.values())
    folded = unique_bytes(constant for constant in constants.values() if constant.how)
    peak, largest = _activations(graphs)
    return {
        "weights": held - folded,
        "folded": folded,
        "activations": int(peak),
        "peak": int(held + peak),
        "largest": largest,
    }


def unique_bytes(constants: Iterable[Constant]) -> int:
    """Bytes of constants, what shares memory counted once."""
    storages = {}
    for constant in constants:
        storage = constant.tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _activations(graphs: Sequence[Graph]) -> tuple[float, str]:
    """The most bytes of values that are alive at once, and the largest value among them, in words."""
    calls = [node for graph in graphs for node in graph.calls]
    owner: dict[str, str] = {}  # a view keeps alive what it looks at
    for node in calls:
        sources = [source.name for source in node.all_input_nodes if source.op != "get_attr"]
        is_view = (node.target in VIEWS or is_getitem(node)) and bool(sources)
        owner[node.name] = owner.get(sources[0], sources[0]) if is_view else node.name
    last = {
        owner.get(source.name, source.name): at
        for at, node in enumerate(calls)
        for source in node.all_input_nodes
    }
    returned = graphs[-1].output.all_input_nodes if graphs else []
    last.update({owner.get(node.name, node.name): len(calls) for node in returned})
    alive: dict[str, tuple[float, fx.Node]] = {}
    peak, largest = 0.0, ""
    for at, node in enumerate(calls):
        if owner[node.name] == node.name:
            alive[node.name] = tensor_bytes(node.meta.get("val")), node
        now = sum(size for size, _ in alive.values())
        if now > peak:
            peak, largest = now, _largest(alive.values())
        for name in [name for name in alive if last.get(name, at) <= at]:
            del alive[name]
    return peak, largest


def _largest(alive: Iterable[tuple[float, fx.Node]]) -> str:
    node = max(alive, key=lambda pair: pair[0])[1]
    return f"{op_name(node)} of {tensors_of(node)} at {provenance.of(node).module or 'the model itself'}"
