"""layer(f(layer(x, w1)), w2) -> the same without the eighth of the channels whose weights are smallest.

Not exact: a channel goes whatever it adds. Each match takes one more eighth of one group, the least damage
first, down to a single channel, and half as many where that costs too much; how far it may go is for the
measured loss to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._groups import channels
from graphopt.passes._magnitude import weakest
from graphopt.passes._narrow import narrow

_SHARE = 1 / 8


def pattern(graph: Graph) -> Iterator[Match]:
    """The weakest channels of every group, in ascending order of the damage expected."""
    return weakest(graph, channels(graph), _SHARE)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Fewer rows before, fewer columns behind."""
    narrow(rewriter, match["group"], match["kept"])


PASS = register(Pass("prune_channels_by_magnitude", "prune", pattern, rewrite, exact=False))
