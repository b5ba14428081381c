"""attention(x wq, x wk, x wv) wo -> the same without the head whose weights are smallest.

Not exact: a head goes whatever it adds. Each match takes one more head of one attention, the least damage
first, down to a single one; heads that share a key and a value go together.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._groups import heads
from graphopt.passes._magnitude import weakest
from graphopt.passes._narrow import narrow


def pattern(graph: Graph) -> Iterator[Match]:
    """The weakest head of every attention, in ascending order of the damage expected."""
    return weakest(graph, heads(graph), share=0)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Narrower projections."""
    narrow(rewriter, match["group"], match["kept"])


PASS = register(Pass("prune_heads_by_magnitude", "prune", pattern, rewrite, exact=False))
