"""(x - mean(x)) / sqrt(var(x) + eps) * w + b in any spelling -> layer_norm(x, w, b, eps)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.passes._moments import widens
from graphopt.passes._norms import (
    cast,
    common_dtype,
    has_fixed_size,
    last,
    norms,
    refuse_norm,
    tailed,
    unwidened,
    vector,
)
from graphopt.passes._terms import Term

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every norm that is spelled out, and torch's own with a weight, a bias or a cast behind it."""
    yield from norms(graph, centred=True)
    for norm in graph.fx.find_nodes(op="call_function", target=aten.layer_norm.default):
        match = None if norm._erased else _of_torch(graph, norm)
        if match is not None and _gains(match, norm):
            yield match


def _gains(match: Match, norm: torch.fx.Node) -> bool:
    """Whether the norm takes something in, or may do without casts."""
    own = all(match[name] is unwidened(argument(norm, name)) for name in ("weight", "bias"))
    own &= match["scale"] == 1 or match["weight"] is None
    return common_dtype(match) != norm.meta["val"].dtype or not own


def _of_torch(graph: Graph, norm: torch.fx.Node) -> Match:
    x, region = norm.args[0], [norm]
    rank, normalised = x.meta["val"].dim(), len(argument(norm, "normalized_shape"))  # type: ignore[union-attr]
    if x.op == "call_function" and widens(x):  # type: ignore[union-attr, arg-type]
        region, x = [x, norm], x.args[0]  # type: ignore[union-attr, list-item]
    weight, eps = argument(norm, "weight"), float(argument(norm, "eps"))
    term = Term(weight=weight, rows=1, power=-0.5, eps=eps, centred=True)
    dims = tuple(range(rank - normalised, rank))
    return tailed(graph, x, dims, region, term, bias=argument(norm, "bias"))  # type: ignore[arg-type]


def check(match: Match) -> str | None:
    """Sizes that are fixed, types that fit, and steps that nobody else reads."""
    if not has_fixed_size(match):
        return "the size of what is normalised is dynamic"
    return refuse_norm(match)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; casts stay where the types of input, weight and result differ."""
    dtype = common_dtype(match)  # torch has no norm of half precision with a float32 weight on a GPU
    x, order = cast(rewriter, match["x"], dtype), last(match)
    if order:
        x = rewriter.call(aten.permute.default, x, order[0])
    sizes = [match.val("x").shape[dim] for dim in match["dims"]]
    weight, bias = (vector(rewriter, match, name, dtype) for name in ("weight", "bias"))
    factor = match["scale"] if match["scale"] != 1 else None
    if factor and weight is not None:
        weight = rewriter.call(aten.mul.Tensor, weight, factor)
    if factor and weight is None and bias is not None:
        bias = rewriter.call(aten.div.Tensor, bias, factor)
    out = rewriter.call(aten.layer_norm.default, x, sizes, weight, bias, match["eps"])
    if factor and weight is None:
        out = rewriter.call(aten.mul.Tensor, out, factor)
    if order:
        out = rewriter.call(aten.permute.default, out, order[1])
    rewriter.replace(match.root, cast(rewriter, out, match.root.meta["val"].dtype))


PASS = register(Pass("fuse_layer_norm", "fuse", pattern, rewrite, check))
