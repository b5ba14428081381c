"""BatchNorm(Conv(x, w, b)) -> Conv(x, w * g, (b - mean) * g + beta), with g = gamma / sqrt(var + eps).

The same for transposed convolutions, and for a norm in front: Conv(BatchNorm(x), w, b) -> Conv(x, w', b'),
where the convolution pads with nothing.
"""

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
    """Every batch norm behind a convolution, or read by convolutions only."""
    return sites(graph, (aten.batch_norm.default,), ("convolution",))


def check(match: Match) -> str | None:
    """Weights and statistics must be constants, and the convolution's own result must not be read."""
    reason: str | None = match["reason"]
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Scale the filters and shift the bias, computed in float64."""
    fold(rewriter, match, "batch norm folded")


PASS = register(Pass("fold_conv_batch_norm", "fold", pattern, rewrite, check))
