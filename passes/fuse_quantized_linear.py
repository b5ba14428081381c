"""linear(x, w8.to(float) * scale, b) -> quantized_linear(x, w8, scale, b): the weight stays in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.quantized_linear import OP as QUANTIZED_LINEAR

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every projection whose weight is made of integers by a cast and a scale."""
    for linear in graph.fx.find_nodes(op="call_function", target=aten.linear.default):
        scaled: Any = argument(linear, "weight")
        if linear._erased or scaled.target is not aten.mul.Tensor:
            continue
        for cast, scale in (scaled.args[:2], scaled.args[1::-1]):
            is_cast = isinstance(cast, fx.Node) and cast.target is aten.to.dtype
            if is_cast and graph.constant(cast.args[0]) is not None:
                bound = {"linear": linear, "weight": cast.args[0], "scale": scale}
                yield Match(graph, linear, tuple(sorted([cast, scaled, linear])), bound)
                break


def check(match: Match) -> str | None:
    """8-bit integers, a constant scale a row in the type of the product, and no other reader."""
    weight, scale, linear = match.constant("weight"), match["scale"], match["linear"]
    assert weight is not None
    if weight.dtype != torch.int8 or weight.dim() != 2:
        return f"the weight is {weight.dtype} of {weight.dim()} dimensions, not int8 of 2"
    values = match.constant("scale") if isinstance(scale, fx.Node) else torch.tensor(scale)
    if values is None:
        return "the scale is not a constant"
    if tuple(values.shape) not in ((), (1,), (1, 1), (weight.shape[0], 1)):
        return f"the scale has shape {list(values.shape)}, not one value a row"
    x = argument(linear, "input").meta["val"].dtype
    if isinstance(scale, fx.Node) and values.dtype != x:
        return f"the scale is {values.dtype}, the product {x}"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Keep the integers: folded, the weight would take four times the memory."""
    weight, scale, linear = match.constant("weight"), match["scale"], match["linear"]
    assert weight is not None
    x = argument(linear, "input")
    is_node = isinstance(scale, fx.Node)
    values = match.constant("scale") if is_node else torch.tensor(scale, device=weight.device)
    assert values is not None
    rows = values.to(x.meta["val"].dtype).reshape(-1).expand(weight.shape[0]).contiguous()
    vector = rewriter.constant(rows, [scale] if is_node else [], "a scale a row")
    call = rewriter.call(QUANTIZED_LINEAR.overload, x, match["weight"], vector, argument(linear, "bias"))
    rewriter.replace(linear, call)


PASS = register(Pass("fuse_quantized_linear", "fuse", pattern, rewrite, check))
