"""linear(table[ids], w, b) -> (table w^T + b)[ids]: a factorised embedding, projected once.

Worth it where the projected table is not much larger: a large vocabulary is better projected when looked up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._growth import bytes_of, refuse_growth
from graphopt.passes._layers import Layer, also_read, layer_of, refuse_range, with_arguments

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every projection of a lookup."""
    for node in graph.fx.find_nodes(op="call_function", target=aten.linear.default):
        second = None if node._erased else layer_of(graph, node)
        first = None if second is None else layer_of(graph, second.source)
        if first is not None and first.kind == "lookup":
            yield Match(graph, node, (first.node, node), {"first": first, "second": second})


def check(match: Match) -> str | None:
    """Constants, no other reader of table or rows, and a table that does not grow much."""
    first, second = match["first"], match["second"]
    reason = first.constants() or second.constants() or also_read(first.node, second.node)
    if reason is not None:
        return str(reason)
    other = next((user for user in first.weight.users if user is not first.node), None)
    if other is not None:
        return f"the table is also read by {other.name}: it would be held twice"
    table, weight = first.weight.meta["val"], second.weight.meta["val"]
    size = table.shape[0] * weight.shape[0] * table.element_size()
    reason = refuse_growth(size, bytes_of(table, weight))
    if reason is None:
        wide = _product(first, second)
        reason = refuse_range(wide, wide, table.dtype)
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Project every row, in float64."""
    first, second = match["first"], match["second"]
    made_from = [n for n in (first.weight, second.weight, second.bias) if n is not None]
    dtype = first.weight.meta["val"].dtype
    projected = rewriter.constant(_product(first, second).to(dtype), made_from, "projected")
    rewriter.replace(match.root, with_arguments(rewriter, first.node, weight=projected))


def _product(first: Layer, second: Layer) -> torch.Tensor:
    table, weight = first.wide_weight()[0, :, :, 0], second.wide_weight()[0, :, :, 0]
    product, bias = (weight @ table).t(), second.wide_bias()
    return product if bias is None else product + bias


PASS = register(Pass("fold_embedding_linear", "fold", pattern, rewrite, check))
