"""Ops that only a GPU's kernels have as one: a norm with the projection ahead of it, or the codes behind it.

Passes make what every executor gains from. This pays on a GPU alone (ONNX Runtime would get the parts again),
and there only where it is measured to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir import provenance
from graphopt.ir.graph import Graph, is_getitem
from graphopt.kernels import add_layer_norm, add_layer_norm_quantize, linear_add_layer_norm, quantize_rows

aten = torch.ops.aten


def joined(graph: Graph) -> Graph:
    """A copy of a graph with ``add_layer_norm(linear(x), residual)`` as one op.

    The projection must have no other reader. A norm that is quantized is one op with that instead: then its
    rows are read once less, which is more than the projection's kernel saves. The new node has the norm's
    name and place in the user's source.
    """
    copy = graph.clone()
    for node in copy.calls:
        if node.target is add_layer_norm.OP.overload and not _join_codes(copy, node):
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


def _join_codes(graph: Graph, norm: fx.Node) -> bool:
    """Let a norm make its codes, too; False where nobody asks for them."""
    normed = [part for part in norm.users if part.args[1:] == (0,)]
    asked = (user for part in normed for user in part.users if user.target is quantize_rows.OP.overload)
    rows = next(asked, None)
    if rows is None or not all(map(is_getitem, rows.users)):
        return False
    with graph.fx.inserting_before(norm):
        place = provenance.merge(norm, (norm, rows))
        made = graph.call(add_layer_norm_quantize.OP.overload, norm.args, {}, place)
    for part in list(rows.users):
        index: Any = part.args[1]
        part.args = (made, _CODES + index)
    norm.replace_all_uses_with(made)
    graph.fx.erase_node(rows)
    graph.fx.erase_node(norm)
    made.name = norm.name
    return True


_CODES = 2  # the place of the codes among the results, and behind them that of their scale
