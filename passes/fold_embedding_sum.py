"""table[ids] + row -> (table + row)[ids], and one[ids] + two[ids] -> (one + two)[ids].

A row is what is the same at every position: a constant, a lookup of ids that are all one number (the token
types of a single segment), or of a table that has one row. It goes into the smallest table, which is not the
one that the head shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import Match, argument
from graphopt.passes._layers import refuse_range, with_arguments
from graphopt.passes._ranges import as_uniform

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """A summand: a lookup in a table, by ids or of one row; or any other value.

    Args:
        node: the summand.
        table: the node of its table, or of the constant that is its row.
        ids: by which node it is looked up; None for a row.
        row: which row; None for a lookup by ids.
    """

    node: fx.Node
    table: fx.Node | None = None
    ids: fx.Node | None = None
    row: int | None = None


def pattern(graph: Graph) -> Iterator[Match]:
    """Every sum of lookups of which two can be one."""
    seen: set[fx.Node] = set()
    for lookup in graph.fx.find_nodes(op="call_function", target=aten.embedding.default):
        top = lookup
        while len(top.users) == 1 and _is_sum(reader := next(iter(top.users))):
            top = reader
        if top is lookup or top in seen or top._erased:
            continue
        seen.add(top)
        adds, terms = _terms(graph, top)
        pair = _pair(terms, top)
        if pair is not None:
            nodes = tuple(sorted({*adds, *(term.node for term in pair if term.ids or term.row is not None)}))
            nodes = tuple(node for node in nodes if node.op == "call_function")
            yield Match(graph, top, nodes, {"terms": terms, "pair": pair})


def check(match: Match) -> str | None:
    """Tables must be constants, and not be read by what is no such lookup."""
    into, other = match["pair"]
    for term in (into, other):
        if match.graph.constant(term.table) is None:
            return "a table is not a constant"
    reader = next((user for user in into.table.users if user.target is not aten.embedding.default), None)
    if reader is not None:
        return f"the table is also read by {reader.name}: it would be held twice"
    wide = _merged(match.graph, into, other)
    return refuse_range(wide, wide, into.table.meta["val"].dtype)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Add the tables, in float64, and what is left of the sum."""
    into, other = match["pair"]
    table = _merged(match.graph, into, other).to(into.table.meta["val"].dtype)
    folded = rewriter.constant(table, [into.table, other.table], "tables added")
    looked_up = with_arguments(rewriter, into.node, weight=folded)
    total: Any = None
    for term in match["terms"]:
        if term is other:
            continue
        value = looked_up if term is into else term.node
        total = value if total is None else rewriter.call(aten.add.Tensor, total, value)
    rewriter.replace(match.root, total)


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and argument(node, "alpha") == 1


def _terms(graph: Graph, top: fx.Node) -> tuple[list[fx.Node], list[_Term]]:
    """The additions that nothing else reads, and what they add, in order."""
    adds, terms, work = [], [], [top]
    while work:
        node = work.pop()
        if isinstance(node, fx.Node) and _is_sum(node) and (node is top or len(node.users) == 1):
            adds.append(node)
            work.extend(reversed(node.args[:2]))  # type: ignore[arg-type]
        else:
            terms.append(_term(graph, node))
    return adds, terms


def _term(graph: Graph, node: fx.Node) -> _Term:
    constant = graph.constant(node)
    if constant is not None and constant.numel() == constant.shape[-1:].numel():
        return _Term(node, node, row=0)
    if not isinstance(node, fx.Node) or node.target is not aten.embedding.default or len(node.users) > 1:
        return _Term(node)
    table, ids = node.args[:2]
    assert isinstance(table, fx.Node)
    if table.meta["val"].shape[0] == 1:
        return _Term(node, table, row=0)
    number = as_uniform(graph, ids)
    if number is not None:
        return _Term(node, table, row=int(number))
    return _Term(node, table, ids)  # type: ignore[arg-type]


def _pair(terms: list[_Term], top: fx.Node) -> tuple[_Term, _Term] | None:
    """A lookup, and what its table can take over without changing the sum's shape or type."""
    if not all(isinstance(term.node, fx.Node) for term in terms):
        return None
    val = top.meta["val"]
    lookups = [t for t in terms if t.ids is not None and t.node.meta["val"].dtype == val.dtype]
    lookups.sort(key=lambda term: term.table.meta["val"].shape[0])  # type: ignore[union-attr]
    for into in lookups:
        for other in terms:
            same_ids = other.ids is not None and other.ids is into.ids
            if (
                other is into
                or not (same_ids or other.row is not None)
                or other.node.meta["val"].dtype != val.dtype
            ):
                continue
            left = [t.node.meta["val"] for t in terms if t is not other]
            if any(same_shape(value.shape, val.shape) for value in left) and _fits(into, other):
                return into, other
    return None


def _fits(into: _Term, other: _Term) -> bool:
    """Rows of the same number of features."""
    assert into.table is not None
    assert other.table is not None
    features = into.table.meta["val"].shape[1]
    return bool(other.table.meta["val"].shape[-1:] == (features,))


def _merged(graph: Graph, into: _Term, other: _Term) -> torch.Tensor:
    """The table of both, in float64; ids that one of two tables does not have cannot occur."""
    one, two = graph.constant(into.table), graph.constant(other.table)
    assert one is not None
    assert two is not None
    if other.row is not None:
        return one.double() + two.double().reshape(-1, one.shape[1])[other.row]
    rows = min(one.shape[0], two.shape[0])
    return one[:rows].double() + two[:rows].double()


PASS = register(Pass("fold_embedding_sum", "fold", pattern, rewrite, check))
