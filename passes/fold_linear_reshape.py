"""reshape(f(reshape(x, (-1, K))), (..., N)) -> f(x): what works on each row by itself takes any rank.

f is made of projections, norms over the features, activations, sums with other values of the same rows: a
whole feed-forward block whose model flattens batch and positions around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match
from graphopt.passes._axes import shape
from graphopt.passes._rows import operands, recomputed, sizes

aten = torch.ops.aten


@dataclass
class _Region:
    """Rows between the reshapes that make them and those that give them their old shape.

    Args:
        flats: the reshapes to rows.
        inner: what is computed of rows.
        ends: the reshapes back.
        other: a value of rows with a reader, or None for itself, that cannot take another shape.
    """

    flats: set[fx.Node] = field(default_factory=set)
    inner: set[fx.Node] = field(default_factory=set)
    ends: set[fx.Node] = field(default_factory=set)
    other: tuple[fx.Node, fx.Node | None] | None = None


def pattern(graph: Graph) -> Iterator[Match]:
    """Every set of reshapes between which rows are computed, at its last reshape."""
    seen: set[fx.Node] = set()
    for node in graph.fx.find_nodes(op="call_function", target=aten.reshape.default):
        if node._erased or node in seen or len(shape(node)) == 2 or _operands(node.args[0]) is None:
            continue
        found = _region(node)
        seen |= found.ends
        if found.flats:
            nodes = tuple(sorted(found.flats | found.inner | found.ends))
            yield Match(graph, max(found.ends), nodes, {"region": found})


def check(match: Match) -> str | None:
    """The rows must come back as they were, and nobody else may read them."""
    found: _Region = match["region"]
    first = shape(min(found.flats).args[0])  # type: ignore[arg-type]
    for flat in sorted(found.flats):
        source = shape(flat.args[0])  # type: ignore[arg-type]
        if not same_size(source[-1], shape(flat)[-1]):
            return f"{flat.name} makes rows of {shape(flat)[-1]} features out of {source[-1]}"
        if not same_shape(source[:-1], first[:-1]):
            return f"rows of shape {list(first[:-1])} meet rows of shape {list(source[:-1])}"
    for end in sorted(found.ends):
        wanted = (*first[:-1], shape(end.args[0])[-1])  # type: ignore[arg-type]
        if not same_shape(shape(end), wanted):
            return f"rows of shape {list(first[:-1])} come back as {list(shape(end)[:-1])}"
    if found.other is None:
        return None
    node, reader = found.other
    return f"{node.name} is also read by {reader.name}" if reader else f"{node.name} is not made of rows"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Compute where the values lie."""
    found: _Region = match["region"]
    new: dict[fx.Node, Any] = {flat: flat.args[0] for flat in found.flats}
    for node in sorted(found.inner):
        new[node] = recomputed(rewriter, node, new)
    for end in sorted(found.ends):
        rewriter.replace(end, new[end.args[0]])  # type: ignore[index]


def _region(end: fx.Node) -> _Region:
    """All rows that are computed together with those that one reshape takes back, in both directions."""
    found = _Region()
    work: list[Any] = [end.args[0]]
    while work:
        node = work.pop()
        if node in found.inner or node in found.flats:
            continue
        if _is_flat(node):
            found.flats.add(node)
            continue
        operands = _operands(node)
        if operands is None:
            found.other = found.other or (node, None)
            continue
        found.inner.add(node)
        work += operands
        for user in node.users:
            if user.target is aten.reshape.default and len(shape(user)) != 2:
                found.ends.add(user)
            elif node in (_operands(user) or []):
                work.append(user)
            else:
                found.other = found.other or (node, user)
    return found


def _is_flat(node: fx.Node) -> bool:
    return node.target is aten.reshape.default and len(shape(node)) == 2 < len(shape(node.all_input_nodes[0]))


def _operands(node: Any) -> list[fx.Node] | None:
    """The sources that a call on flat rows has a row of for each of its rows, or None."""
    found = operands(node)
    return found if found is not None and len(sizes(node)) == 2 else None


PASS = register(Pass("fold_linear_reshape", "fold", pattern, rewrite, check))
