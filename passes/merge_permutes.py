"""permute(permute(x, p), q) -> permute(x, p q), or x; a permute that swaps two dimensions -> transpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument

aten = torch.ops.aten

_TARGETS = (aten.transpose.int, aten.permute.default, aten.t.default)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every permutation of a permuted value, and every single one with a simpler spelling."""
    for node in graph.calls:
        order = None if node._erased else permutation(node)
        if order is None:
            continue
        chain, source = [node], node.all_input_nodes[0]
        while (inner := permutation(source)) is not None:
            order = [inner[dim] for dim in order]
            chain.append(source)
            source = source.all_input_nodes[0]
        if len(chain) > 1 or node.target is not _spelling(order)[0]:
            bindings = {"source": source, "order": tuple(order)}
            yield Match(graph, node, tuple(reversed(chain)), bindings)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Move every dimension once; inner permutations that others read stay."""
    target, args = _spelling(match["order"])
    new = match["source"] if target is None else rewriter.call(target, match["source"], *args)
    rewriter.replace(match.root, new)


def permutation(node: fx.Node) -> list[int] | None:
    """The dimension of its source that each dimension of a permuted value is, or None."""
    if node.op != "call_function" or node.target not in _TARGETS:
        return None
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [dim % rank for dim in argument(node, "dims")]
    if node.target is aten.transpose.int and rank:
        one, two = argument(node, "dim0") % rank, argument(node, "dim1") % rank
        order[one], order[two] = two, one
    return order[::-1] if node.target is aten.t.default else order


def _spelling(order: tuple[int, ...] | list[int]) -> tuple[Any, tuple[object, ...]]:
    """Nothing, a transpose or a permute: the op, None for the value itself, with its arguments."""
    moved = [dim for dim, source in enumerate(order) if dim != source]
    if not moved:
        return None, ()
    return (aten.transpose.int, tuple(moved)) if len(moved) == 2 else (aten.permute.default, (list(order),))


PASS = register(Pass("merge_permutes", "prune", pattern, rewrite))
