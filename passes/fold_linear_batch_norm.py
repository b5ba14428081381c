"""BatchNorm(Linear(x, w, b)) -> Linear(x, w', b'), and Linear(BatchNorm(x), w, b) -> Linear(x, w', b')."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._absorb import fold, sites

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every batch norm behind a projection, or read by projections only, through reshapes and transposes."""
    return sites(graph, (aten.batch_norm.default,), ("projection",))


def check(match: Match) -> str | None:
    """Weights and statistics must be constants, and nothing may read what lies between."""
    reason: str | None = match["reason"]
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Scale the weights and shift the bias, computed in float64."""
    fold(rewriter, match, "batch norm folded")


PASS = register(Pass("fold_linear_batch_norm", "fold", pattern, rewrite, check))
