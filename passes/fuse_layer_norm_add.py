"""r + layer_norm(x, w, b) -> layer_norm_add(x, r, w, b)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.kernels.layer_norm_add import OP as LAYER_NORM_ADD
from graphopt.passes._residual import norm_sums, refuse_norm_sum


def pattern(graph: Graph) -> Iterator[Match]:
    """Every sum of a layer norm and another tensor."""
    norm = torch.ops.aten.layer_norm.default
    return norm_sums(graph, norm, shape="normalized_shape", w="weight", b="bias", eps="eps")


def check(match: Match) -> str | None:
    """One normalised dimension; a norm that only the sum reads, of the sum's shape."""
    if len(match["shape"]) != 1:
        return f"{len(match['shape'])} dimensions are normalised together"
    return refuse_norm_sum(match)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The norm is added where it is computed, not written and read again."""
    args = match["x"], match["r"], match["w"], match["b"], float(match["eps"])
    rewriter.replace(match.root, rewriter.call(LAYER_NORM_ADD.overload, *args))


PASS = register(Pass("fuse_layer_norm_add", "fuse", pattern, rewrite, check))
