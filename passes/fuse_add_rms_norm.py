"""rms_norm(x + r, w) -> add_rms_norm(x, r, w), which also returns x + r."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.kernels.add_rms_norm import OP as ADD_RMS_NORM
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.passes._residual import refuse_residual, replace, sums


def pattern(graph: Graph) -> Iterator[Match]:
    """Every RMS norm of a sum."""
    return sums(graph, RMS_NORM.overload, w="weight", eps="eps")


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The sum is read once instead of twice."""
    replace(rewriter, match, ADD_RMS_NORM, match["w"], match["eps"])


PASS = register(Pass("fuse_add_rms_norm", "fuse", pattern, rewrite, refuse_residual))
