"""What is known of parts that a reshape gives a dimension of their own: (B, S, 3 * H * D) as (B, S, 3, H, D).

A value knows of its channels what all of its parts have in common. Where one part is taken out again, by
``unbind`` or ``select``, that part is known by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from graphopt.ir.graph import same_size
from graphopt.ir.pattern import argument
from graphopt.passes._axes import Axis, shape
from graphopt.passes._permutations import permutation

aten = torch.ops.aten


class Stack(NamedTuple):
    """The parts of a value.

    Args:
        dim: the dimension that they lie along, counted from the end.
        parts: (parts, outer, units, inner): what is known of each, NaN where it varies.
    """

    dim: int
    parts: torch.Tensor


def stacked(
    node: fx.Node,
    axes: dict[fx.Node, Axis],
    values: dict[fx.Node, torch.Tensor],
    stacks: dict[fx.Node, Stack],
    arranged: Callable[[torch.Tensor, Axis], torch.Tensor],
) -> Stack | None:
    """The parts of a value of a group, from those of its source; None where they lie along no dimension."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or source not in axes:
        return None
    axis, before = axes[node], stacks.get(source)
    if node.target is aten.reshape.default:
        count, rest = divmod(axes[source].outer, axis.outer)
        dim = axis.dim - 1
        alone = count > 1 and not rest and -dim <= len(shape(node)) and same_size(shape(node)[dim], count)
        if before is not None or not alone:
            return None
        parts = values[source].reshape(count, axis.outer, *values[source].shape[1:])
        return Stack(dim, torch.stack([arranged(part, axis) for part in parts]))
    if before is None:
        return None
    order = permutation(node)
    if order is not None:
        return before._replace(dim=order.index(before.dim + len(order)) - len(order))
    return before if node.target is aten.unbind.int else None


def taken(node: fx.Node, stacks: dict[fx.Node, Stack]) -> torch.Tensor | None:
    """What is known of one part that a call takes out of its source, (outer, units, inner), or None."""
    source: Any = node.all_input_nodes[0] if node.all_input_nodes else None
    if source not in stacks:
        return None
    if node.target is operator.getitem and source.target is aten.unbind.int:
        along, index = source, node.args[1]
    elif node.target is aten.select.int:
        along, index = node, argument(node, "index")
    else:
        return None
    rank = len(shape(source))
    if argument(along, "dim") % rank - rank != stacks[source].dim or not isinstance(index, int):
        return None
    return stacks[source].parts[index]
