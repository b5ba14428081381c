"""u / sqrt(mean(u^2) + eps) * w in any spelling -> rms_norm(u, w, eps)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.passes._moments import widens
from graphopt.passes._norms import cast, last, norms, operand_dtype, refuse_norm, tailed, vector
from graphopt.passes._terms import Term

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every norm that is spelled out, and torch's own."""
    for match in norms(graph, centred=False):
        of_length_1 = match["scale"] != 1 and match["weight"] is None
        if not of_length_1 or (match["eps"] and not match["flaw"]):  # x / norm(x) is two ops already
            yield match
    for norm in graph.fx.find_nodes(op="call_function", target=aten.rms_norm.default):
        if not norm._erased:
            yield _of_torch(graph, norm)


def _of_torch(graph: Graph, norm: torch.fx.Node) -> Match:
    x, eps = norm.args[0], argument(norm, "eps")
    rank, normalised = x.meta["val"].dim(), len(argument(norm, "normalized_shape"))  # type: ignore[union-attr]
    eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else float(eps)  # type: ignore[union-attr]
    region = [norm]
    if x.op == "call_function" and widens(x):  # type: ignore[union-attr, arg-type]
        region, x = [x, norm], x.args[0]  # type: ignore[union-attr, list-item]
    dims = tuple(range(rank - normalised, rank))
    term = Term(weight=argument(norm, "weight"), rows=1, power=-0.5, eps=eps)
    return tailed(graph, x, dims, region, term)  # type: ignore[arg-type]


def check(match: Match) -> str | None:
    """One dimension, types that fit, and steps that nobody else reads."""
    if len(match["dims"]) != 1:
        return f"{len(match['dims'])} dimensions are normalised together"
    return refuse_norm(match)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; casts stay where the result's type is not the input's."""
    dtype = operand_dtype(match)
    x, order = cast(rewriter, match["x"], dtype), last(match)
    if order:
        x = rewriter.call(aten.permute.default, x, order[0])
    weight = vector(rewriter, match, "weight", dtype)
    if match["scale"] != 1 and weight is not None:
        weight = rewriter.call(aten.mul.Tensor, weight, match["scale"])
    out = rewriter.call(RMS_NORM.overload, x, weight, match["eps"])
    if match["scale"] != 1 and weight is None:
        out = rewriter.call(aten.mul.Tensor, out, match["scale"])
    if order:
        out = rewriter.call(aten.permute.default, out, order[1])
    rewriter.replace(match.root, cast(rewriter, out, match.root.meta["val"].dtype))


PASS = register(Pass("fuse_rms_norm", "fuse", pattern, rewrite, check))
