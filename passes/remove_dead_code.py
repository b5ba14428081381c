"""A call that nobody reads -> nothing."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, has_effect
from graphopt.ir.pattern import Match


def pattern(graph: Graph) -> Iterator[Match]:
    """Every call without readers, last first, so that one sweep takes whole chains."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node._erased and not node.users and not has_effect(node):
            yield Match(graph, node, (node,))


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Erase it."""
    rewriter.remove(match.root)


PASS = register(Pass("remove_dead_code", "prune", pattern, rewrite))
