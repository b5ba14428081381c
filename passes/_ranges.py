"""What a value is, whatever the inputs are: 0, 1, 2, ... n-1 along a dimension, or one number everywhere."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, same_size
from graphopt.ir.pattern import argument

aten = torch.ops.aten

_LONG = (torch.int64, torch.int32)  # wide enough for any position


@dataclass(frozen=True)
class Range:
    """The integers from ``start`` on, one a position along one dimension, the same along all others.

    Args:
        start: the first.
        length: how many; may be symbolic.
        dim: the dimension that they run along, counted from the end: -1 is the last.
    """

    start: int
    length: Any
    dim: int


def as_range(graph: Graph, node: Any) -> Range | None:
    """The range that a node computes, or None.

    Traced through casts, inserted and expanded dimensions, slices, and the addition of a literal; constants
    are compared by value.
    """
    if not isinstance(node, fx.Node):
        return None
    constant = graph.constant(node)
    if constant is not None:
        return _constant_range(constant)
    rule = _RANGES.get(node.target) if node.op == "call_function" else None
    if rule is None or node.meta["val"].dtype not in _LONG:
        return None
    return rule(graph, node)


def _constant_range(constant: torch.Tensor) -> Range | None:
    long = [dim for dim, size in enumerate(constant.shape) if size > 1]
    if constant.dtype not in _LONG or len(long) != 1:
        return None
    dim = long[0]
    start, length = int(constant.flatten()[0]), constant.shape[dim]
    if not torch.equal(constant.flatten().cpu(), torch.arange(start, start + length, dtype=constant.dtype)):
        return None
    return Range(start, length, dim - constant.dim())


def _arange(graph: Graph, node: fx.Node) -> Range | None:
    has_start = node.target is not aten.arange.default
    start = argument(node, "start") if has_start else 0
    step = argument(node, "step") if node.target is aten.arange.start_step else 1
    return Range(start, node.meta["val"].shape[0], -1) if isinstance(start, int) and step == 1 else None


def _same(graph: Graph, node: fx.Node) -> Range | None:
    return as_range(graph, node.args[0])


def _shifted(sign: int) -> Callable[[Graph, fx.Node], Range | None]:
    def rule(graph: Graph, node: fx.Node) -> Range | None:
        by, found = argument(node, "other"), as_range(graph, node.args[0])
        if found is None or not isinstance(by, int) or argument(node, "alpha") != 1:
            return None
        return replace(found, start=found.start + sign * by)

    return rule


def _expanded(graph: Graph, node: fx.Node) -> Range | None:
    found = as_range(graph, node.args[0])
    return found if found and same_size(node.meta["val"].shape[found.dim], found.length) else None


def _unsqueezed(graph: Graph, node: fx.Node) -> Range | None:
    found = as_range(graph, node.args[0])
    if found is None:
        return None
    rank, position = node.meta["val"].dim(), argument(node, "dim")
    inserted = position % rank - rank  # counted from the end
    return replace(found, dim=found.dim - 1 if found.dim <= inserted else found.dim)


def _reshaped(graph: Graph, node: fx.Node) -> Range | None:
    found = as_range(graph, node.args[0])
    source: Any = node.args[0]
    if found is None or not _alone(source.meta["val"].shape, found.dim):
        return None
    shape = node.meta["val"].shape
    for dim in range(-len(shape), 0):
        if same_size(shape[dim], found.length) and _alone(shape, dim):
            return replace(found, dim=dim)
    return None


def _alone(shape: Any, dim: int) -> bool:
    """True when every other dimension has size 1."""
    return all(same_size(size, 1) for index, size in enumerate(shape) if index - len(shape) != dim)


def _sliced(graph: Graph, node: fx.Node) -> Range | None:
    found = as_range(graph, node.args[0])
    if found is None:
        return None
    shape = node.meta["val"].shape
    if argument(node, "dim") % len(shape) - len(shape) != found.dim:
        return found
    start = argument(node, "start") or 0
    if not isinstance(start, int) or start < 0 or argument(node, "step") != 1:
        return None
    return Range(found.start + start, shape[found.dim], found.dim)


_RANGES: dict[Any, Callable[[Graph, fx.Node], Range | None]] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.add.Tensor: _shifted(1),
    aten.sub.Tensor: _shifted(-1),
    aten.expand.default: _expanded,
    aten.unsqueeze.default: _unsqueezed,
    aten.reshape.default: _reshaped,
    aten.slice.Tensor: _sliced,
    aten.to.dtype: _same,
}


def as_uniform(graph: Graph, node: Any) -> bool | int | float | None:
    """The number that a value is everywhere, or None.

    Besides filled tensors and what only moves their elements, this knows comparisons of ranges with literals,
    and the differences of a range's neighbours: position ids without a gap.
    """
    if isinstance(node, (int, float)):
        return node
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    constant = graph.constant(node)
    if constant is not None:
        first = constant.flatten()[0].item() if constant.numel() else None
        same = isinstance(first, (bool, int, float)) and bool((constant == first).all())
        return first if same else None
    rule = _UNIFORM.get(node.target) if node.op == "call_function" else None
    return None if rule is None else rule(graph, node)


def _filled(with_: Any) -> Callable[[Graph, fx.Node], Any]:
    def rule(graph: Graph, node: fx.Node) -> Any:
        number = argument(node, with_) if isinstance(with_, str) else with_
        return _cast(number, node)

    return rule


def _moved(graph: Graph, node: fx.Node) -> Any:
    number = as_uniform(graph, node.args[0])
    return None if number is None else _cast(number, node)


def _cast(number: Any, node: fx.Node) -> Any:
    """A literal as an element of the node's value has it."""
    if not isinstance(number, (bool, int, float)):
        return None
    return torch.tensor(number).to(node.meta["val"].dtype).item()


def _compared(by: Callable[[Any, Any], bool]) -> Callable[[Graph, fx.Node], Any]:
    """A comparison of two uniform values, or of a range from ``start`` on with a literal."""

    def rule(graph: Graph, node: fx.Node) -> Any:
        left, right = as_uniform(graph, node.args[0]), as_uniform(graph, node.args[1])
        if left is not None and right is not None:
            return by(left, right)
        found = as_range(graph, node.args[0])
        if found is not None and right is not None and by in (operator.ge, operator.gt):
            return True if by(found.start, right) else None
        return None

    return rule


def _differences(graph: Graph, node: fx.Node) -> Any:
    """1 between neighbours of a range; in front, a prepended value must be the one before the first."""
    found, dim = as_range(graph, node.args[0]), argument(node, "dim")
    rank = node.meta["val"].dim()
    plain = argument(node, "n") == 1 and argument(node, "append") is None
    if found is None or not plain or dim % rank - rank != found.dim:
        return None
    if argument(node, "prepend") is not None:
        before = as_range(graph, argument(node, "prepend"))
        if before is None or before.start != found.start - 1 or not same_size(before.length, 1):
            return None
    return 1


def _chosen(graph: Graph, node: fx.Node) -> Any:
    condition = as_uniform(graph, node.args[0])
    number = None if condition is None else as_uniform(graph, node.args[1 if condition else 2])
    return None if number is None else _cast(number, node)


def _sum_of_zeros(graph: Graph, node: fx.Node) -> Any:
    return 0 if as_uniform(graph, node.args[0]) == 0 else None


_UNIFORM: dict[Any, Callable[[Graph, fx.Node], Any]] = {
    aten.full.default: _filled("fill_value"),
    aten.full_like.default: _filled("fill_value"),
    aten.new_full.default: _filled("fill_value"),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _filled(1)),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _filled(0)),
    aten.expand.default: _moved,
    aten.unsqueeze.default: _moved,
    aten.reshape.default: _moved,
    aten.slice.Tensor: _moved,
    aten.index.Tensor: _moved,
    aten.gather.default: _moved,
    aten.index_select.default: _moved,
    aten.select.int: _moved,
    aten.expand_as.default: _moved,
    aten.to.dtype: _moved,
    **dict.fromkeys((aten.ge.Scalar, aten.ge.Tensor), _compared(operator.ge)),
    **dict.fromkeys((aten.gt.Scalar, aten.gt.Tensor), _compared(operator.gt)),
    **dict.fromkeys((aten.eq.Scalar, aten.eq.Tensor), _compared(operator.eq)),
    **dict.fromkeys((aten.ne.Scalar, aten.ne.Tensor), _compared(operator.ne)),
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), _chosen),
    aten.diff.default: _differences,
    aten.cumsum.default: _sum_of_zeros,
}


def is_causal(graph: Graph, node: Any) -> bool:
    """True for a mask over (..., query, key) that allows exactly the keys up to the query's position.

    Two ranges compared (``key <= query``, ``query > key - 1``), a lower triangle of true, or an upper one of
    numbers that forbid.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target in _COMPARISONS:
        key_first, margin = _COMPARISONS[node.target]
        key, query = node.args[:2] if key_first else node.args[1::-1]
        keys, queries = as_range(graph, key), as_range(graph, query)
        if keys is None or queries is None:
            return False
        if (keys.dim, queries.dim) != (-1, -2) or queries.start - keys.start != margin:
            return False
        rows, columns = node.meta["val"].shape[-2:]
        return same_size(queries.length, rows) and same_size(keys.length, columns)
    dtype = node.meta["val"].dtype
    triangle: Any = node.args[0] if node.target is aten.to.dtype and dtype == torch.bool else node
    if triangle.target is aten.tril.default and dtype == torch.bool:
        return argument(triangle, "diagonal") == 0 and as_uniform(graph, triangle.args[0]) == 1
    if node.target is aten.triu.default and dtype.is_floating_point:
        filled = as_uniform(graph, node.args[0])
        return argument(node, "diagonal") == 1 and filled is not None and filled <= torch.finfo(dtype).min / 2
    return False


# Whether the key is the first operand, and by how much the query's range must start later.
_COMPARISONS: dict[Any, tuple[bool, int]] = {
    aten.le.Tensor: (True, 0),
    aten.lt.Tensor: (True, 1),
    aten.ge.Tensor: (False, 0),
    aten.gt.Tensor: (False, 1),
}
