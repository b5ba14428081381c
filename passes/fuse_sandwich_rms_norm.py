"""rms_norm(r + rms_norm(x, w), v) -> sandwich_rms_norm(x, r, w, v), which also returns the sum."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.kernels.sandwich_rms_norm import OP as SANDWICH_RMS_NORM
from graphopt.passes._residual import refuse_norm_sum, replace, sums, sums_of_norm


def pattern(graph: Graph) -> Iterator[Match]:
    """Every RMS norm of a sum of an RMS norm and another tensor."""
    for outer in sums(graph, RMS_NORM.overload, next_w="weight", next_eps="eps"):
        for inner in sums_of_norm(graph, outer["sum"], RMS_NORM.overload, w="weight", eps="eps"):
            nodes = tuple(sorted({*inner.nodes, *outer.nodes}))
            bound = {**outer.bindings, **inner.bindings, "inner": inner}
            yield Match(graph, outer.root, nodes, bound)


def check(match: Match) -> str | None:
    """As for the sum of a norm; the norm of the sum has that norm's type."""
    reason = refuse_norm_sum(match["inner"])
    if reason is None and match.val("normed").dtype != match.root.meta["val"].dtype:
        reason = f"the norms are {match.val('normed').dtype} and {match.root.meta['val'].dtype}"
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Two summands are read and two results written, by one kernel instead of two."""
    args = match["w"], match["next_w"], match["eps"], match["next_eps"]
    replace(rewriter, match, SANDWICH_RMS_NORM, *args)


PASS = register(Pass("fuse_sandwich_rms_norm", "fuse", pattern, rewrite, check))
