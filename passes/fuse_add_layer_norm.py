"""layer_norm(x + r, w, b) -> add_layer_norm(x, r, w, b), which also returns x + r."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.kernels.add_layer_norm import OP as ADD_LAYER_NORM
from graphopt.passes._residual import refuse_residual, replace, sums


def pattern(graph: Graph) -> Iterator[Match]:
    """Every layer norm of a sum."""
    norm = torch.ops.aten.layer_norm.default
    return sums(graph, norm, shape="normalized_shape", w="weight", b="bias", eps="eps")


def check(match: Match) -> str | None:
    """One normalised dimension; summands that the op can add."""
    if len(match["shape"]) != 1:
        return f"{len(match['shape'])} dimensions are normalised together"
    return refuse_residual(match)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The sum is read once instead of twice."""
    replace(rewriter, match, ADD_LAYER_NORM, match["w"], match["b"], float(match["eps"]))


PASS = register(Pass("fuse_add_layer_norm", "fuse", pattern, rewrite, check))
