"""linear(x, w, b) * c + d -> linear(x, w * c, b * c + d), and linear(x * c + d, w, b) -> linear(x, w', b').

A constant by which a projection or a convolution is multiplied, or that is added to it, one number for all
or one a channel; behind it or in front, through reshapes and transposes. In front: the ``(x - mean) / std``
of normalised images.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._absorb import fold, sites
from graphopt.passes._affine import STEPS


def pattern(graph: Graph) -> Iterator[Match]:
    """Every multiplication by a constant, and addition of one, next to a layer."""
    return sites(graph, STEPS, ("projection", "convolution"))


def check(match: Match) -> str | None:
    """Constants, one a channel; no border of zeros to shift; nobody who reads the value between."""
    reason: str | None = match["reason"]
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Scale the weights, computed in float64."""
    fold(rewriter, match, "scale folded")


PASS = register(
    Pass("fold_scale", "fold", pattern, rewrite, check, opens=("fold_linear_linear", "fold_conv_conv"))
)
