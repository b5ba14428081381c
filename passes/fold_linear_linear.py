"""linear(linear(x, w1, b1), w2, b2) -> linear(x, w2 w1, w2 b1 + b2), where the product costs less.

By the weights alone, whatever the number of rows: in * out multiplications a row against hidden * (in + out).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._affine import MOVES, moved
from graphopt.passes._layers import Layer, also_read, bias_of_both, layer_of, refuse_range, with_arguments

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every projection of a projection; between them, rows may move."""
    for node in graph.fx.find_nodes(op="call_function", target=aten.linear.default):
        moves: list[fx.Node] = []
        inner: Any = None if node._erased else node.args[0]
        while isinstance(inner, fx.Node) and inner.target in MOVES:
            moves.insert(0, inner)
            inner = inner.args[0]
        first, second = layer_of(graph, inner), layer_of(graph, node)
        if first is None or second is None or first.kind != "projection" or not _keeps_features(first, moves):
            continue
        yield Match(
            graph, node, (inner, *moves, node), {"first": first, "second": second, "moves": tuple(moves)}
        )


def check(match: Match) -> str | None:
    """Constants, nobody who reads the hidden value, and fewer multiplications."""
    first, second = match["first"], match["second"]
    reason = first.constants() or second.constants()
    if reason is not None:
        return str(reason)
    for value, reader in itertools.pairwise(match.nodes):
        reason = also_read(value, reader)
        if reason is not None:
            return reason
    hidden, features = first.weight.meta["val"].shape
    apart, together = hidden * (features + second.channels), features * second.channels
    if together >= apart:
        return f"one product takes {2 * together} FLOPs a row, the two take {2 * apart}"
    weight, bias = _product(first, second)
    dtype = second.weight.meta["val"].dtype
    return refuse_range(weight, weight, dtype) or (
        refuse_range(bias, bias, dtype) if bias is not None else None
    )


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Multiply the weights, in float64."""
    first, second = match["first"], match["second"]
    weight, bias = _product(first, second)
    dtype = second.weight.meta["val"].dtype
    made_from = [n for layer in (first, second) for n in (layer.weight, layer.bias) if n is not None]
    folded = rewriter.constant(weight.to(dtype), made_from, "multiplied")
    shifted = None if bias is None else rewriter.constant(bias.to(dtype), made_from, "multiplied")
    value = first.source
    for move in match["moves"]:
        value = _again(rewriter, move, value)
    rewriter.replace(
        match.root, with_arguments(rewriter, match.root, input=value, weight=folded, bias=shifted)
    )


def _product(first: Layer, second: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (out, in) and bias (out,) of both layers in one, in float64."""
    one, two = (layer.wide_weight()[0, :, :, 0] for layer in (first, second))
    return two @ one, bias_of_both(first, second, two)


def _keeps_features(first: Layer, moves: list[fx.Node]) -> bool:
    """True when the features are still the last dimension, in order, behind the moves."""
    size = first.channels
    numbers: torch.Tensor | None = torch.arange(size).reshape(*[1] * (first.node.meta["val"].dim() - 1), size)
    for move in moves:
        numbers = None if numbers is None else moved(numbers, move)
    return numbers is not None and numbers.shape[-1:] == (size,) and numbers.numel() == size


def _again(rewriter: Rewriter, move: fx.Node, value: fx.Node) -> fx.Node:
    """The same move of rows that have another number of features."""
    args: list[Any] = list(move.args[1:])
    if move.target is aten.reshape.default:
        args[0] = [*args[0][:-1], value.meta["val"].shape[-1]]
    return rewriter.call(move.target, value, *args, **move.kwargs)  # type: ignore[arg-type]


PASS = register(Pass("fold_linear_linear", "fold", pattern, rewrite, check))
