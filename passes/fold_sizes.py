"""A size computed twice -> computed once; (4 * s) // 4 -> s; a size that is one number -> that number.

By the expressions of the symbolic sizes. What is made of sizes (ranges, masks, position tables) reads the
same nodes in every layer then, so that it is merged and computed once a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, is_symbolic
from graphopt.ir.pattern import Match


def pattern(graph: Graph) -> Iterator[Match]:
    """Every size that an earlier node computes, and every reader of a size that does not vary."""
    known: dict[Any, fx.Node] = {}
    for node in graph.calls:
        if node._erased or not is_symbolic(node):
            continue
        expression = _expression(node)
        if isinstance(expression, int):
            for user in [user for user in node.users if user.op == "call_function"]:
                yield Match(graph, user, (node, user), {"size": node, "number": expression})
        elif expression is not None and known.setdefault(expression, node) is not node:
            yield Match(graph, node, (node,), {"size": node, "same": known[expression]})


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Read the first, or the number."""
    size, root = match["size"], match.root
    if match.get("same") is not None:
        rewriter.replace(root, match["same"])
        return
    args, kwargs = fx.map_arg((root.args, root.kwargs), lambda n: match["number"] if n is size else n)
    rewriter.replace(root, rewriter.call(root.target, *args, **kwargs))  # type: ignore[arg-type]


def _expression(node: fx.Node) -> Any:
    """What tells a size from others: an int, or its expression over the sizes of the inputs."""
    size = node.meta["val"]
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return size if type(size) is int else None


PASS = register(Pass("fold_sizes", "fold", pattern, rewrite))
