"""layer(f(layer(x, w1)), w2) -> the same without the channels whose rows of w1, or columns of w2, are zero.

Exact for finite values: a channel that is zero is taken to add nothing even where what it meets is infinite.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._groups import channels, idle
from graphopt.passes._narrow import narrow


def pattern(graph: Graph) -> Iterator[Match]:
    """Every group of layers with channels that add nothing, or whose weights in one layer are zero."""
    return idle(graph, channels(graph))


def check(match: Match) -> str | None:
    """Every value between the layers must keep the channels apart."""
    group, zero = match["group"], match["zero"]
    if group.refusal is None:
        return None
    return f"{int(zero.sum())} of {group.units} channels are zero, but {group.refusal}"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Fewer rows before, fewer columns behind; a layer keeps at least one."""
    kept = torch.nonzero(~match["zero"]).flatten().tolist()
    narrow(rewriter, match["group"], kept or [0])


PASS = register(Pass("prune_zero_channels", "prune", pattern, rewrite, check))
