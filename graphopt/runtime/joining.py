"""Ops that only a GPU's kernels have as one: a projection with the sum and the norm that follow it.

Passes make what every executor gains from. This pays on a GPU alone (ONNX Runtime would get the parts again),
and there only where it is measured to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir import provenance
from graphopt.ir.graph import Graph
from graphopt.kernels import add_layer_norm, linear_add_layer_norm

aten = torch.ops.aten


def joined(graph: Graph) -> Graph:
    """A copy of a graph with ``add_layer_norm(linear(x), residual)`` as one op.

    The projection must have no other reader. The new node has the norm's name and place in the user's source.
    """
    copy = graph.clone()
    for node in copy.calls:
        if node.target is add_layer_norm.OP.overload:
            _join(copy, node)
    copy.module.recompile()
    return copy


def _join(graph: Graph, norm: fx.Node) -> None:
    one, other, *rest = norm.args
    for linear, residual in ((one, other), (other, one)):
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
            continue
        if len(linear.users) > 1:
            continue
        x, weight, *bias = linear.args
        args: tuple[Any, ...] = (x, weight, bias[0] if bias else None, residual, *rest)
        place = provenance.merge(norm, (linear, norm))
        try:
            with graph.fx.inserting_before(norm):
                made = graph.call(linear_add_layer_norm.OP.overload, args, {}, place)
        except ValueError:  # dtypes that the op does not take together
            return
        norm.replace_all_uses_with(made)
        graph.fx.erase_node(norm)
        graph.fx.erase_node(linear)
        made.name = norm.name
        return
