"""An operation that returns its input (dropout, same-type cast, x + 0, x * 1, full slice, ...) -> input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match, argument
from graphopt.passes._ranges import as_uniform

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every call that a rule below recognises, with the value that it passes on."""
    for node in graph.calls:
        rule = _RULES.get(node.target)
        if rule is None or node._erased:
            continue
        source = rule(graph, node)
        if isinstance(source, fx.Node):
            through = source in node.all_input_nodes
            nodes = (node,) if through else (node.all_input_nodes[0], node)
            yield Match(graph, node, nodes, {"source": source})


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Let the readers read the source."""
    rewriter.replace(match.root, match["source"])


def _first(graph: Graph, node: fx.Node) -> Any:
    return node.args[0]


def _first_if_same(graph: Graph, node: fx.Node) -> Any:
    """Views and casts: the first argument, when nothing changes."""
    source: Any = node.args[0]
    result, before = node.meta["val"], source.meta["val"]
    return source if result.dtype == before.dtype and same_shape(result.shape, before.shape) else None


def _dropout(graph: Graph, node: fx.Node) -> Any:
    return node.args[0] if not argument(node, "train") else None


def _neutral(value: float) -> Callable[[Graph, fx.Node], Any]:
    """The other operand of ``x + 0``, ``0 + x``, ``x * 1``, ``1 * x``, when type and shape stay."""

    def rule(graph: Graph, node: fx.Node) -> Any:
        for this, other in ((0, 1), (1, 0)):
            if as_uniform(graph, node.args[other]) == value and _keeps(node, node.args[this]):
                return node.args[this]
        return None

    return rule


def _neutral_right(value: float) -> Callable[[Graph, fx.Node], Any]:
    """The left operand of ``x - 0`` and ``x / 1``, when type and shape stay."""

    def rule(graph: Graph, node: fx.Node) -> Any:
        neutral = as_uniform(graph, node.args[1]) == value
        return node.args[0] if neutral and _keeps(node, node.args[0]) else None

    return rule


def _and_true(graph: Graph, node: fx.Node) -> Any:
    """The other operand of a logical and with a mask that is true everywhere."""
    if node.meta["val"].dtype != torch.bool:  # an and of bits
        return None
    for this, other in ((0, 1), (1, 0)):
        if as_uniform(graph, node.args[other]) and _keeps(node, node.args[this]):
            return node.args[this]
    return None


def _full_slice(graph: Graph, node: fx.Node) -> Any:
    source: Any = node.args[0]
    size = source.meta["val"].shape[argument(node, "dim")]
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    end = end.meta["val"] if isinstance(end, fx.Node) else end
    full = end is None or (isinstance(end, int) and end >= 2**62) or same_size(end, size)
    return source if start in (None, 0) and step == 1 and full else None


def _transpose_twice(graph: Graph, node: fx.Node) -> Any:
    inner: Any = node.args[0]
    if inner.target is not aten.transpose.int or inner.op != "call_function":
        return None
    rank = node.meta["val"].dim()
    dims = [{dim % rank for dim in call.args[1:]} for call in (inner, node)]
    return inner.args[0] if dims[0] == dims[1] else None


def _keeps(node: fx.Node, source: Any) -> bool:
    if not isinstance(source, fx.Node) or argument_or(node, "alpha", 1) != 1:
        return False
    result, before = node.meta["val"], source.meta["val"]
    if not isinstance(before, torch.Tensor):
        return False
    return result.dtype == before.dtype and same_shape(result.shape, before.shape)


def argument_or(node: fx.Node, name: str, default: Any) -> Any:
    """A call's argument, or the default when its op has none of that name."""
    try:
        return argument(node, name)
    except KeyError:
        return default


_RULES: dict[Any, Callable[[Graph, fx.Node], Any]] = {
    aten.dropout.default: _dropout,
    aten.clone.default: _first,
    aten.alias.default: _first,
    aten.detach.default: _first,
    aten.contiguous.default: _first,
    aten.to.dtype: _first_if_same,
    aten.type_as.default: _first_if_same,
    aten.reshape.default: _first_if_same,
    aten.expand.default: _first_if_same,
    aten.slice.Tensor: _full_slice,
    aten.transpose.int: _transpose_twice,
    aten.add.Tensor: _neutral(0),
    aten.sub.Tensor: _neutral_right(0),
    aten.mul.Tensor: _neutral(1),
    aten.div.Tensor: _neutral_right(1),
    aten.__and__.Tensor: _and_true,
    aten.bitwise_and.Tensor: _and_true,
    aten.logical_and.default: _and_true,
}

PASS = register(Pass("remove_noops", "prune", pattern, rewrite))
