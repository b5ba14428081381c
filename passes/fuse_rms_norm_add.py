"""r + rms_norm(x, w) -> rms_norm_add(x, r, w)."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.kernels.rms_norm_add import OP as RMS_NORM_ADD
from graphopt.passes._residual import norm_sums, refuse_norm_sum


def pattern(graph: Graph) -> Iterator[Match]:
    """Every sum of an RMS norm and another tensor."""
    return norm_sums(graph, RMS_NORM.overload, w="weight", eps="eps")


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The norm is added where it is computed, not written and read again."""
    args = match["x"], match["r"], match["w"], match["eps"]
    rewriter.replace(match.root, rewriter.call(RMS_NORM_ADD.overload, *args))


PASS = register(Pass("fuse_rms_norm_add", "fuse", pattern, rewrite, refuse_norm_sum))
