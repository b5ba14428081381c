"""matmul(x, w) -> linear(x, w^T), and einsum("bsd,dhk->bshk", x, w) -> reshape(linear(x, w')): one layout.

So it is where many weights meet one value, as the experts of a mixture do:
matmul(unsqueeze(x), w), w of three dimensions -> permute(reshape(linear(x, w'))).

A product with a constant is a projection, whatever the order of its weight's dimensions. A transposed weight
is a view: its memory stays the model's own, and ONNX's Gemm reads it as it lies. Only a weight whose
dimensions an einsum mixes is copied, once, at compile time.

Filters keep their layout. Six 3 x 3 convolutions and ReLUs with channels-last filters take 0.8 times the
time at (1, 64, 56, 56), the same at (1, 128, 28, 28) and (1, 256, 14, 14), and 1.15 times at (1, 512, 7, 7)
(PyTorch on one thread of a CPU, float32): no gain for a whole network. ONNX Runtime blocks channels at load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._products import REPEATED, as_product, behind_transposes

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.mm.default)
_EQUATION = re.compile(r"((?:\.\.\.)?\w*),((?:\.\.\.)?\w*)->((?:\.\.\.)?\w*)")


@dataclass(frozen=True)
class _Layout:
    """How a weight becomes a projection's.

    Args:
        order: its dimensions: first those of the result, then those that are summed over.
        made: how many are of the result.
        result: where the result's dimensions lie when x's come first and the weight's last; None for there.
    """

    order: tuple[int, ...]
    made: int
    result: tuple[int, ...] | None = None


def pattern(graph: Graph) -> Iterator[Match]:
    """Every product of a value and a weight."""
    for target in _PRODUCTS:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            x, w = (None, None) if node._erased else node.args[:2]
            if _is_weight(graph, x, w) and w.meta["val"].dim() == 2:  # type: ignore[union-attr]
                yield Match(graph, node, (node,), {"x": x, "w": w, "layout": _Layout((1, 0), 1)})
    for target in (aten.matmul.default, aten.bmm.default):
        for node in graph.fx.find_nodes(op="call_function", target=target):
            if not node._erased:
                yield from _of_many_weights(graph, node)
    for node in graph.fx.find_nodes(op="call_function", target=aten.einsum.default):
        operands: Any = () if node._erased else node.args[1]
        found = _EQUATION.fullmatch(str(node.args[0]).replace(" ", "")) if len(operands) == 2 else None
        if found is None:
            continue
        left, right, result = found.groups()
        if graph.constant(operands[0]) is not None:
            (left, right), operands = (right, left), operands[::-1]
        if _is_weight(graph, *operands) and not set(right) <= set(result):  # an outer product sums nothing
            layout = _layout(left, right, result, operands[0].meta["val"].dim())
            yield Match(graph, node, (node,), {"x": operands[0], "w": operands[1], "layout": layout})


def _of_many_weights(graph: Graph, node: fx.Node) -> Iterator[Match]:
    """A product of several weights with one value, which is repeated for it."""
    product = as_product(node)
    if product is None or graph.constant(product.right.node) is None or len(product.right.axes) < 3:
        return
    value = behind_transposes(product.left)
    sides = (value.axes, product.right.axes, product.axes)
    if any(REPEATED in side for side in sides[:2]) or graph.constant(value.node) is not None:
        return
    letters = {name: chr(ord("a") + i) for i, name in enumerate((*product.axes, product.summed))}
    x, w, result = ("".join(letters[name] for name in side) for side in sides)
    layout = _layout(x, w, result, len(x))
    if layout is not None:
        yield Match(graph, node, (node,), {"x": value.node, "w": product.right.node, "layout": layout})


def _is_weight(graph: Graph, x: Any, w: Any) -> bool:
    return isinstance(x, fx.Node) and graph.constant(x) is None and graph.constant(w) is not None


def check(match: Match) -> str | None:
    """The weight must meet the last dimensions of the value, and share no dimension with the result."""
    if match["layout"] is None:
        return "the weight does not meet the last dimensions, or is another one for each row"
    if not match.val("w").dtype.is_floating_point or match.val("w").dtype != match.val("x").dtype:
        return f"a {match.val('w').dtype} weight multiplies {match.val('x').dtype}"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Lay the weight out as (features out, features in); as a view where it has two dimensions."""
    layout, weight, x = match["layout"], match.constant("w"), match["x"]
    assert weight is not None
    made = [weight.shape[dim] for dim in layout.order[: layout.made]]
    summed = len(layout.order) - layout.made
    node = match["w"]
    if layout.order != (0, 1):
        matrix = weight.permute(layout.order).reshape(math.prod(made), -1)
        node = rewriter.constant(matrix, [node], "transposed" if weight.dim() == 2 else "laid out")
    kept = _sizes(rewriter, x, x.meta["val"].dim() - summed)
    if summed > 1:
        x = rewriter.call(aten.reshape.default, x, [*kept, node.meta["val"].shape[1]])
    result = rewriter.call(aten.linear.default, x, node)
    if layout.made > 1:
        result = rewriter.call(aten.reshape.default, result, [*kept, *made])
    if layout.result is not None:
        result = rewriter.call(aten.permute.default, result, list(layout.result))
    rewriter.replace(match.root, result)


def _sizes(rewriter: Rewriter, x: fx.Node, count: int) -> list[Any]:
    """The first sizes of a value: numbers, or nodes where they vary."""
    sizes = x.meta["val"].shape[:count]
    return [
        size if isinstance(size, int) else rewriter.call(aten.sym_size.int, x, dim)
        for dim, size in enumerate(sizes)
    ]


def _layout(x: str, w: str, result: str, rank: int) -> _Layout | None:
    """The layout of an einsum's weight; None when the einsum is no projection of the last dimensions."""
    if x.startswith("...") != result.startswith("...") or "." in w:
        return None
    x, result, dots = x.removeprefix("..."), result.removeprefix("..."), x.startswith("...")
    if any(len(set(side)) < len(side) for side in (x, w, result)) or not (dots or len(x) == rank):
        return None
    made = "".join(index for index in result if index in w)
    summed = "".join(index for index in x if index in w)
    kept = x.removesuffix(summed)
    if not made or not summed or set(made) & set(summed) or {*made, *summed} != {*w}:
        return None
    if kept + summed != x or {*kept, *made} != {*result}:
        return None
    lies = tuple((kept + made).index(index) for index in result)
    moved = lies != tuple(range(len(result)))
    if moved and dots:
        return None
    return _Layout(tuple(w.index(index) for index in made + summed), len(made), lies if moved else None)


PASS = register(Pass("fold_weight_layout", "fold", pattern, rewrite, check))
