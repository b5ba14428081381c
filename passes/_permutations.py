"""Calls that put the dimensions of a value in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir.pattern import argument

aten = torch.ops.aten

PERMUTATIONS = (aten.transpose.int, aten.permute.default, aten.t.default)


def permutation(node: fx.Node) -> list[int] | None:
    """The dimension of its source that each dimension of a permuted value is, or None."""
    if node.op != "call_function" or node.target not in PERMUTATIONS:
        return None
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [dim % rank for dim in argument(node, "dims")]
    if node.target is aten.transpose.int and rank:
        one, two = argument(node, "dim0") % rank, argument(node, "dim1") % rank
        order[one], order[two] = two, one
    return order[::-1] if node.target is aten.t.default else order


def spelling(order: Sequence[int]) -> tuple[Any, tuple[object, ...]]:
    """Nothing, a transpose or a permute: the op, None for the value itself, with its arguments."""
    moved = [dim for dim, source in enumerate(order) if dim != source]
    if not moved:
        return None, ()
    return (aten.transpose.int, tuple(moved)) if len(moved) == 2 else (aten.permute.default, (list(order),))
