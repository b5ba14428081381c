"""f(constants) -> constant: everything that does not depend on the inputs is computed once."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from graphopt.compiler.evaluate import evaluate
from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, has_effect, is_symbolic, tensor_bytes
from graphopt.ir.pattern import Match

aten = torch.ops.aten

_MAX_GROWTH = 16 * 2**20  # bytes that a folded constant may be larger than what it is made from


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
    made_from = sum(tensor_bytes(source.meta["val"]) for source in match.inputs)
    growth = tensor_bytes(match.root.meta["val"]) - made_from
    if growth > _MAX_GROWTH:
        return f"the constant would be {growth / 2**20:.0f} MiB larger than what it is made from"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Compute it now."""
    (value,) = evaluate(match.graph, [match.root], {})
    how = " of ".join(dict.fromkeys(str(node.target) for node in reversed(match.nodes)))
    rewriter.replace(match.root, rewriter.constant(value, match.inputs, how))


def _foldable(node: fx.Node) -> bool:
    """False for randomness, effects, and sizes that vary."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or has_effect(node) or is_symbolic(node):
        return False
    return not any(isinstance(size, torch.SymInt) for size in getattr(node.meta["val"], "shape", ()))


PASS = register(Pass("fold_constants", "fold", pattern, rewrite, check))
