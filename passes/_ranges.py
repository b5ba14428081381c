"""Recognising 0, 1, 2, ... n-1 along one dimension, whatever spells it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph

aten = torch.ops.aten


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

    Traced through ``unsqueeze``, ``expand``, ``reshape`` to one long dimension, and the addition of a literal;
    constants are compared by value.
    """
    if not isinstance(node, fx.Node):
        return None
    constant = graph.constant(node)
    if constant is not None:
        return _constant_range(constant)
    if node.op != "call_function":
        return None
    if node.target is aten.arange.default:
        return Range(0, node.meta["val"].shape[0], -1)
    if node.target is aten.arange.start_step and node.args[1:3] in ((), (1,)):
        return None
    if node.target is aten.arange.start and isinstance(node.args[0], int):
        return Range(node.args[0], node.meta["val"].shape[0], -1)
    if node.target is aten.add.Tensor and isinstance(node.args[1], int):
        found = as_range(graph, node.args[0])
        return replace(found, start=found.start + node.args[1]) if found else None
    if node.target is aten.expand.default:
        return as_range(graph, node.args[0])
    if node.target is aten.unsqueeze.default:
        return _unsqueezed(as_range(graph, node.args[0]), node)
    return None


def _unsqueezed(inner: Range | None, node: fx.Node) -> Range | None:
    if inner is None:
        return None
    rank = node.meta["val"].dim()
    position: Any = node.args[1]
    inserted = position % rank - rank  # counted from the end
    moved = inner.dim - 1 if inner.dim <= inserted else inner.dim
    return replace(inner, dim=moved)


def _constant_range(constant: torch.Tensor) -> Range | None:
    if constant.is_floating_point() or constant.dtype == torch.bool or constant.numel() == 0:
        return None
    long = [dim for dim, size in enumerate(constant.shape) if size > 1]
    if len(long) != 1:
        return None
    dim = long[0]
    start, length = int(constant.flatten()[0]), constant.shape[dim]
    if not torch.equal(constant.flatten().cpu(), torch.arange(start, start + length, dtype=constant.dtype)):
        return None
    return Range(start, length, dim - constant.dim())


def is_causal_comparison(graph: Graph, node: Any) -> bool:
    """True for ``key position <= query position`` over (..., query, key), both counted from 0."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target is aten.le.Tensor:
        key, query = node.args[:2]
    elif node.target is aten.ge.Tensor:
        query, key = node.args[:2]
    else:
        return False
    keys, queries = as_range(graph, key), as_range(graph, query)
    return (
        keys is not None
        and queries is not None
        and (keys.dim, queries.dim) == (-1, -2)
        and keys.start == queries.start == 0
    )
