"""Calls that work on each row of features by itself, whatever the dimensions in front of those are."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_shape, same_size
from graphopt.passes._axes import ELEMENTWISE, mixed_dims, shape

aten = torch.ops.aten

_FEATURES = {  # what works along one dimension, with the position of that argument; None where it is the last
    aten.layer_norm.default: None,
    aten.rms_norm.default: None,
    aten.softmax.int: 1,
    aten.cat.default: 1,
    aten.slice.Tensor: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
}


def operands(node: Any) -> list[fx.Node] | None:
    """The sources of a call with a row for each of its rows; None when it does not work on rows.

    Whatever else it reads is the same for every row.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(sizes(node)) < 2:
        return None
    if node.target is aten.linear.default or (node.target is operator.getitem and _is_split(node.args[0])):
        found = node.all_input_nodes[:1]
    elif node.target in ELEMENTWISE or node.target is aten.cat.default:
        found = [source for source in node.all_input_nodes if _has_rows(source, node)]
        if not all(source in found or _is_one_row(source) for source in node.all_input_nodes):
            return None
    else:
        found = node.all_input_nodes[:1] if node.target in _FEATURES else []
    if node.target in _FEATURES and (
        mixed_dims(node) != {-1} or len(node.args) <= (_FEATURES[node.target] or 0)
    ):
        return None
    return found if found and all(_has_rows(source, node) for source in found) else None


def recomputed(rewriter: Rewriter, node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The same call of the same rows, which may have other dimensions in front of their features.

    Args:
        rewriter: builds the node.
        node: a call that works on rows.
        new: what it reads now, by what it read.
    """
    args = list(fx.map_arg(node.args, lambda source: new.get(source, source)))
    target: Any = node.target
    at = _FEATURES.get(target)
    if at is not None:
        args[at] = -1
    return rewriter.call(target, *args, **node.kwargs)


def sizes(node: fx.Node) -> Any:
    """The shape of a tensor, that of the source for its parts, and () for what is neither."""
    return shape(node) if isinstance(node.meta.get("val"), torch.Tensor) or _is_split(node) else ()


def _has_rows(source: fx.Node, node: fx.Node) -> bool:
    own, rows = sizes(source), sizes(node)[:-1]
    if len(own) != len(rows) + 1 or not same_shape(own[:-1], rows):
        return False
    return source.op != "get_attr" or not _is_one_row(source)


def _is_one_row(source: fx.Node) -> bool:
    return all(same_size(size, 1) for size in sizes(source)[:-1])


def _is_split(node: Any) -> bool:
    return node.target in (aten.split.Tensor, aten.split_with_sizes.default)
