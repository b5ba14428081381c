"""Positions that operations treat alike: what computes nothing but the positions that a slice takes."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import same_size
from graphopt.ir.pattern import argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._axes import ELEMENTWISE, mixed_dims, shape
from graphopt.passes._permutations import permutation

aten = torch.ops.aten

_ATTENTIONS = {aten.scaled_dot_product_attention.default: -2, ATTENTION.overload: -3}
_RESHAPES = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)
_ALONG = (
    *(aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int, aten.cat.default),
    aten.slice.Tensor,
)
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
_POINTWISE = frozenset({*ELEMENTWISE, aten.where.self, aten.masked_fill.Scalar})


@dataclass(frozen=True)
class Region:
    """What is needed at the positions of a slice only.

    Args:
        nodes: every value, with the dimension of the positions, counted from the end.
        last: the slice takes the last position and no other.
    """

    nodes: dict[fx.Node, int]
    last: bool


def is_view(node: fx.Node) -> bool:
    """True for what computes nothing."""
    return node.target in (*_RESHAPES, operator.getitem, aten.split.Tensor) or permutation(node) is not None


def region(source: fx.Node, dim: int, slices: Collection[fx.Node], last: bool) -> Region:
    """Everything that only leads to slices of a value, backwards, as long as positions are not mixed."""
    found: dict[fx.Node, int] = {}
    needed: dict[fx.Node, dict[fx.Node, int]] = {source: dict.fromkeys(slices, dim)}
    work = {source}
    while work:
        node = max(work)  # the latest: all that reads it has been looked at
        work.remove(node)
        dims = set(needed[node].values())
        if set(node.users) != set(needed[node]) or len(dims) != 1 or node.op != "call_function":
            continue
        at = dims.pop()
        sources = behind(node, at, last)
        if not sources:
            continue
        found[node] = at
        for other, its in sources.items():
            if other not in needed:
                work.add(other)
            needed.setdefault(other, {})[node] = its
    for node in list(found):  # a split gives all of its parts, or none
        if node.target is operator.getitem and node.all_input_nodes[0] not in found:
            del found[node]
    return Region(found, last)


def behind(node: fx.Node, dim: int, last: bool) -> dict[fx.Node, int] | None:
    """The sources that are needed at the positions of a value only, with their dimension; None if all are.

    Args:
        node: a call.
        dim: the dimension of its positions, counted from the end.
        last: only the last position is needed.
    """
    target = node.target
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if target in _POINTWISE:
        return _operands(node, dim)
    if target in _ALONG:
        mixed = mixed_dims(node)
        return None if mixed is None or dim in mixed else _operands(node, dim)
    if target is aten.linear.default:
        return {source: dim} if dim != -1 else None
    if target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
        return {node.args[0]: dim} if dim == -2 and len(shape(node.args[0])) > 1 else None  # type: ignore[dict-item, arg-type]
    if target is aten.baddbmm.default:
        return None if dim != -2 else {node.args[1]: dim, **(_operands(node, dim, node.args[:1]) or {})}  # type: ignore[dict-item]
    if target is aten.embedding.default:
        return {node.args[1]: dim + 1} if dim < -1 else None  # type: ignore[dict-item]
    if target in _REDUCTIONS:
        return _reduced(node, dim)
    order = permutation(node)
    if order is not None:
        return {source: order[dim] - len(order)}
    if target in _RESHAPES:
        at = _reshaped(shape(node), shape(source), dim)
        return None if at is None else {source: at}
    if target is aten.split.Tensor or target is aten.split_with_sizes.default:
        return {source: dim} if argument(node, "dim") % len(shape(node)) != dim + len(shape(node)) else None
    if target is operator.getitem:
        return {source: dim} if source.target in (aten.split.Tensor, aten.split_with_sizes.default) else None
    return _attended(node, dim, last) if target in _ATTENTIONS else None


def _operands(node: fx.Node, dim: int, operands: Sequence[Any] | None = None) -> dict[fx.Node, int] | None:
    """Those of the operands (by default all) that are not the same at every position."""
    size = shape(node)[dim]
    found = {}
    for source in node.all_input_nodes if operands is None else operands:
        sizes = shape(source) if isinstance(source.meta.get("val"), torch.Tensor) else ()
        if len(sizes) >= -dim and not same_size(sizes[dim], 1):
            if not same_size(sizes[dim], size):
                return None
            found[source] = dim
    return found or None


def _reduced(node: fx.Node, dim: int) -> dict[fx.Node, int] | None:
    source, mixed = node.all_input_nodes[0], mixed_dims(node)
    if mixed is None:
        return None
    rank = len(shape(source))
    keeps = rank == len(shape(node))
    at = [d for d in range(-rank, 0) if keeps or d not in mixed][dim]
    return None if at in mixed else {source: at}


def _reshaped(before: Any, after: Any, dim: int) -> int | None:
    """Where a dimension is in a value of another shape: all dimensions on one side of it must be the same."""
    right = -dim
    if right <= len(after) and all(same_size(before[-1 - i], after[-1 - i]) for i in range(right)):
        return dim
    left = len(before) + dim + 1
    if left <= len(after) and all(same_size(before[i], after[i]) for i in range(left)):
        return left - 1 - len(after)
    return None


def _attended(node: fx.Node, dim: int, last: bool) -> dict[fx.Node, int] | None:
    """The query's positions, and the rows of a mask; the last query of a causal attention sees every key."""
    query, key, value = node.args[:3]
    target: Any = node.target
    if dim != _ATTENTIONS[target] or query is key or query is value or len(shape(query)) != 4:  # type: ignore[arg-type]
        return None
    if argument(node, "is_causal") and not (last and same_size(shape(query)[dim], shape(key)[dim])):  # type: ignore[arg-type]
        return None
    found: dict[Any, int] = {query: dim}
    mask = argument(node, "mask" if node.target is ATTENTION.overload else "attn_mask")
    if mask is not None and len(shape(mask)) >= 2 and not same_size(shape(mask)[-2], 1):
        found[mask] = -2
    return found


def with_positions(node: fx.Node, dim: int, length: Any, last: bool) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call that is made for some positions only."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if node.target is aten.reshape.default:
        given: Any = args[1]
        sizes = [
            n if size == -1 and isinstance(n, int) else size
            for size, n in zip(given, shape(node), strict=True)
        ]
        sizes[dim] = length if isinstance(length, int) else -1
        args[1] = sizes
    if node.target in _ATTENTIONS and last:
        index = 4 if node.target is ATTENTION.overload else 5
        if len(args) > index:
            args[index] = False
        elif "is_causal" in kwargs:
            kwargs["is_causal"] = False
    return args, kwargs


def is_last(index: Any, size: Any) -> bool:
    """True for the index of the last of so many positions."""
    return bool(index == -1) or (isinstance(index, int) and index >= 0 and same_size(size, index + 1))
