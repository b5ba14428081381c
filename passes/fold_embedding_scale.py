"""table[ids] * c + d -> (table * c + d)[ids]: c and d are one number for all or one a feature.

Unless the table is also the head's, which would then be held twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._absorb import Site, fold, sites
from graphopt.passes._affine import STEPS, Affine

_ROW = 1  # how many dimensions a row of features has


def pattern(graph: Graph) -> Iterator[Match]:
    """Every multiplication of a lookup by a constant, and every addition of a row; not that of positions."""
    for match in sites(graph, STEPS, ("lookup",)):
        site: Site = match["site"]
        steps = [site.affine.scale, site.affine.shift] if isinstance(site.affine, Affine) else []
        if all(sum(size > 1 for size in step.shape) <= _ROW for step in steps if step is not None):
            yield match


def check(match: Match) -> str | None:
    """The table must be a constant that nothing else reads, and so must be what is looked up."""
    reason: str | None = match["reason"]
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Scale the table, computed in float64."""
    fold(rewriter, match, "scale folded")


PASS = register(Pass("fold_embedding_scale", "fold", pattern, rewrite, check))
