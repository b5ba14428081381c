"""f(x), f(x) -> f(x), read twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, has_effect
from graphopt.ir.pattern import Match


def pattern(graph: Graph) -> Iterator[Match]:
    """Every call that an earlier call repeats, with that earlier call."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.calls:
        if node._erased or _is_random(node) or has_effect(node):
            continue
        first = seen.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if first is not node:
            yield Match(graph, node, (node,), {"first": first})


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Let the readers of the second read the first."""
    rewriter.replace(match.root, match["first"])


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in sorted(value.items()))
    # 1, 1.0 and True are equal and hash alike, as are 0.0 and -0.0, and are different arguments
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


PASS = register(Pass("merge_common_subexpressions", "prune", pattern, rewrite))
