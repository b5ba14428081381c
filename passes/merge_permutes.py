"""permute(permute(x, p), q) -> permute(x, p q), or x; a permute that swaps two dimensions -> transpose."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._permutations import permutation, spelling


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
        if len(chain) > 1 or node.target is not spelling(order)[0]:
            bindings = {"source": source, "order": tuple(order)}
            yield Match(graph, node, tuple(reversed(chain)), bindings)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Move every dimension once; inner permutations that others read stay."""
    target, args = spelling(match["order"])
    new = match["source"] if target is None else rewriter.call(target, match["source"], *args)
    rewriter.replace(match.root, new)


PASS = register(Pass("merge_permutes", "prune", pattern, rewrite))
