"""An operation that returns its input (dropout, same-type cast, x + 0, x * 1, full slice, ...) -> input."""

from __future__ import annotations

import operator
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
            through = source in node.all_input_nodes and rule is not _repeated
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


def _chosen(graph: Graph, node: fx.Node) -> Any:
    """The side of a choice that is the same everywhere."""
    condition = as_uniform(graph, node.args[0])
    side = None if condition is None else node.args[1 if condition else 2]
    return side if _keeps(node, side) else None


def _masked_nowhere(graph: Graph, node: fx.Node) -> Any:
    nowhere = as_uniform(graph, argument(node, "mask")) is False
    return node.args[0] if nowhere and _keeps(node, node.args[0]) else None


def _or_false(graph: Graph, node: fx.Node) -> Any:
    """The other operand of a logical or with a mask that is false everywhere."""
    if node.meta["val"].dtype != torch.bool:  # an or of bits
        return None
    for this, other in ((0, 1), (1, 0)):
        if as_uniform(graph, node.args[other]) is False and _keeps(node, node.args[this]):
            return node.args[this]
    return None


def _cast(graph: Graph, node: fx.Node) -> Any:
    """A cast to the type that the value has, or had before a cast to one that holds all of its numbers."""
    inner: Any = node.args[0]
    if inner.target is aten.to.dtype:
        source = inner.args[0]
        before, between = source.meta["val"].dtype, inner.meta["val"].dtype
        holds = torch.promote_types(before, between) == between and _exactly(before, between)
        if node.meta["val"].dtype == before and holds:
            return source
    return _first_if_same(graph, node)


def _exactly(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """True unless integers would be rounded: floats of 24 or 53 bits do not hold all of 32 or 64."""
    return narrow.is_floating_point == wide.is_floating_point or narrow in (
        torch.bool,
        torch.uint8,
        torch.int8,
    )


def _repeated(graph: Graph, node: fx.Node) -> Any:
    """What does nothing to its own result: relu(relu(x)), abs(abs(x))."""
    inner: Any = node.args[0]
    return inner if inner.target is node.target else None


def _single(graph: Graph, node: fx.Node) -> Any:
    """The only one that is concatenated."""
    tensors: Any = node.args[0]
    return tensors[0] if len(tensors) == 1 else None


def _unsplit(graph: Graph, node: fx.Node) -> Any:
    """The only part of a split."""
    split: Any = node.args[0]
    is_split = split.target in (aten.split.Tensor, aten.split_with_sizes.default)
    return split.args[0] if is_split and _keeps(node, split.args[0]) else None


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
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default), _dropout),
    **dict.fromkeys((aten.alpha_dropout.default, aten.feature_alpha_dropout.default), _dropout),
    aten.clone.default: _first,
    aten.alias.default: _first,
    aten.detach.default: _first,
    aten.contiguous.default: _first,
    aten.to.dtype: _cast,
    aten.type_as.default: _first_if_same,
    aten.reshape.default: _first_if_same,
    aten.squeeze.default: _first_if_same,
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _first_if_same),
    aten.expand.default: _first_if_same,
    **dict.fromkeys((aten.repeat.default, aten.constant_pad_nd.default, aten.pad.default), _first_if_same),
    aten.slice.Tensor: _full_slice,
    aten.transpose.int: _transpose_twice,
    aten.add.Tensor: _neutral(0),
    aten.sub.Tensor: _neutral_right(0),
    aten.mul.Tensor: _neutral(1),
    aten.div.Tensor: _neutral_right(1),
    aten.__and__.Tensor: _and_true,
    aten.bitwise_and.Tensor: _and_true,
    aten.logical_and.default: _and_true,
    **dict.fromkeys((aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default), _or_false),
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), _chosen),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_nowhere),
    **dict.fromkeys((aten.relu.default, aten.abs.default, aten.ceil.default), _repeated),
    **dict.fromkeys((aten.floor.default, aten.round.default, aten.trunc.default), _repeated),
    aten.cat.default: _single,
    operator.getitem: _unsplit,
}

PASS = register(Pass("remove_noops", "prune", pattern, rewrite))
