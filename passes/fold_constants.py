"""f(constants) -> constant: everything that does not depend on the inputs is computed once.

What an expand repeats along the leading dimensions (a position bias, once for every sequence of the batch) is
not held repeatedly: constant -> expand(constant). How large a constant may be stands in ``_growth.py``; what
exceeds it is computed at every call, once for all that read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from graphopt.compiler.evaluate import evaluate
from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, has_effect, is_symbolic
from graphopt.ir.pattern import Match
from graphopt.passes._growth import bytes_of, refuse_growth

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """The last node of every maximal region that depends on constants only."""
    known: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = set()
        elif node.op == "call_function" and _foldable(node) and all(s in known for s in node.all_input_nodes):
            known[node] = {node}.union(*(known[source] for source in node.all_input_nodes))
    for node, region in known.items():
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            readers = [user for user in node.users if user not in known or _stays(user, known)]
            if readers and not _stays(node, known):
                yield Match(graph, node, tuple(sorted(region)))


def _stays(node: fx.Node, known: Collection[fx.Node]) -> bool:
    """True for an expand that something else reads: as a constant it would hold its copies."""
    return node.target is aten.expand.default and any(user not in known for user in node.users)


def check(match: Match) -> str | None:
    """Refuse to trade a cheap computation for a large constant."""
    made_from = bytes_of(*(source.meta["val"] for source in match.inputs))
    reason = refuse_growth(bytes_of(match.root.meta["val"]), made_from)
    if reason is not None and _expands(match):
        reason = refuse_growth(bytes_of(_value(match)), made_from)
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Compute it now."""
    value = _value(match)
    how = " of ".join(dict.fromkeys(str(node.target) for node in reversed(match.nodes)))
    folded = rewriter.constant(value, match.inputs, how)
    shape = match.root.meta["val"].shape
    if value.shape != shape:
        folded = rewriter.call(aten.expand.default, folded, list(shape))
    rewriter.replace(match.root, folded)


def _expands(match: Match) -> bool:
    return any(node.target is aten.expand.default for node in match.nodes)


def _value(match: Match) -> torch.Tensor:
    """What the region computes, without what an expand repeats along its leading dimensions."""
    (value,) = evaluate(match.graph, [match.root], {})
    if _expands(match) and value.numel():
        for dim in range(value.dim() - 1):
            first = value.narrow(dim, 0, 1)
            if not torch.equal(value, first.expand_as(value)):
                break
            value = first
    found: torch.Tensor = value.contiguous() if value.shape != match.root.meta["val"].shape else value
    return found


def _foldable(node: fx.Node) -> bool:
    """False for randomness, effects, and sizes that vary."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or has_effect(node) or is_symbolic(node):
        return False
    return not any(isinstance(size, torch.SymInt) for size in getattr(node.meta["val"], "shape", ()))


PASS = register(Pass("fold_constants", "fold", pattern, rewrite, check))
