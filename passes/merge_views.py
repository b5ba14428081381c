"""reshape(permute(reshape(x))) -> the fewest reshapes, selections and permutations that do the same to x.

Two reshapes are one. ``x.reshape(S, B * H, D).transpose(0, 1).reshape(B, H, S, D)`` is one permutation of
``x.reshape(S, B, H, D)``, and needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._views import Chain, chains, is_view, known_sizes, once, spelled, steps, unnamed


def pattern(graph: Graph) -> Iterator[Match]:
    """Every chain of views that can be shorter; one inside a longer chain is left to that one."""
    for node in graph.calls:
        if node._erased or not is_view(node) or (node.users and all(map(is_view, node.users))):
            continue
        for chain in chains(node):
            if len(steps(chain.layout)) < len(chain.nodes):
                yield Match(graph, chain.nodes[-1], chain.nodes, {"chain": chain})


def check(match: Match) -> str | None:
    """Every size of the result must be a number, a size of the source, or the only other one."""
    chain: Chain = match["chain"]
    return unnamed(chain.layout, chain.source.meta["val"].shape, known_sizes(chain.nodes))


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Say it at once; inner views that others read stay."""
    chain: Chain = match["chain"]
    new = spelled(once(rewriter), chain.source, chain.layout, known_sizes(chain.nodes))
    rewriter.replace(match.root, new)


PASS = register(Pass("merge_views", "prune", pattern, rewrite, check, opens=("fold_sizes",)))
