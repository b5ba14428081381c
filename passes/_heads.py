"""Arranging queries, keys, values and masks as attention takes them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_size
from graphopt.ir.pattern import argument
from graphopt.passes._permutations import permutation, spelling
from graphopt.passes._products import Operand

aten = torch.ops.aten

Axes = Sequence[str]


def permuted(rewriter: Rewriter, node: fx.Node, order: Sequence[int]) -> fx.Node:
    """The node with its axes in another order, cancelled against what reordered them before."""
    before = permutation(node)
    if before is not None:
        source: Any = node.args[0]
        return permuted(rewriter, source, [before[i] for i in order])
    if list(order) == list(range(len(order))):
        return node
    part = _part_of_permuted(node)
    if part is not None:
        base, axes, at, index = part
        if [axes[i] for i in order] == sorted(axes):
            return rewriter.call(aten.select.int, base, at, index)
    target, args = spelling(order)
    return rewriter.call(target, node, *args)


def _part_of_permuted(node: fx.Node) -> tuple[fx.Node, list[int], int, int] | None:
    """For one slice of a permuted value: that value unpermuted, the slice's axes there, axis and index.

    How one packed projection is taken apart: ``qkv.reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4)[0]``.
    """
    if node.op != "call_function":
        return None
    source: Any = node.args[0]
    if node.target is operator.getitem and source.target is aten.unbind.int:
        whole, dim, index = source.args[0], argument(source, "dim"), node.args[1]
    elif node.target is aten.select.int:
        whole, dim, index = source, argument(node, "dim"), argument(node, "index")
    else:
        return None
    order = permutation(whole)
    if order is None or not isinstance(index, int):
        return None
    dim = dim % len(order)
    return whole.args[0], [axis for i, axis in enumerate(order) if i != dim], order[dim], index


def tokens_first(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """(B, H, S, D) as (B, S, H, D)."""
    return permuted(rewriter, node, (0, 2, 1, 3))


def unrepeated(node: fx.Node) -> fx.Node:
    """k behind ``reshape(expand(unsqueeze(k, 2), (B, K, n, T, D)), (B, K * n, T, D))``, where repeated so."""
    if node.target is aten.repeat_interleave.self_int and argument(node, "dim") in (1, -3):
        repeated: Any = node.args[0]
        return repeated if isinstance(repeated, fx.Node) else node
    expand: Any = node.args[0] if node.target is aten.reshape.default else None
    if not isinstance(expand, fx.Node) or expand.target is not aten.expand.default:
        return node
    unsqueeze: Any = expand.args[0]
    if not isinstance(unsqueeze, fx.Node) or unsqueeze.target is not aten.unsqueeze.default:
        return node
    source: Any = unsqueeze.args[0]
    result, original = node.meta["val"], source.meta["val"]
    same_rest = original.dim() == result.dim() == 4 and all(
        same_size(original.shape[dim], result.shape[dim]) for dim in (0, 2, 3)
    )
    return source if unsqueeze.args[1] == 2 and same_rest else node


def size(rewriter: Rewriter, node: fx.Node, dim: int) -> Any:
    """A size as a literal, or as a node where it is dynamic."""
    known = node.meta["val"].shape[dim]
    return known if isinstance(known, int) else rewriter.call(aten.sym_size.int, node, dim)


def grouped(rewriter: Rewriter, operand: Operand, groups: Sequence[Axes]) -> fx.Node:
    """The operand with one axis for each group of axes, in that order; 1 for a group of none.

    Args:
        rewriter: builds the nodes.
        operand: every axis is of a group, or has size 1.
        groups: names of axes; those of a group that the operand lacks are not repeated.
    """
    wanted = [[name for name in group if name in operand.axes] for group in groups]
    named = [operand.axes.index(name) for group in wanted for name in group]
    rest = [i for i in range(len(operand.axes)) if i not in named]
    node = permuted(rewriter, operand.node, [*rest, *named])
    if not rest and all(len(group) <= 1 for group in wanted):
        for place, group in enumerate(wanted):
            if not group:
                node = rewriter.call(aten.unsqueeze.default, node, place)
        return node
    sizes: list[Any] = []
    at = len(rest)
    inferred = False
    for group in wanted:
        shape = node.meta["val"].shape[at : at + len(group)]
        if all(isinstance(n, int) for n in shape):
            sizes.append(math.prod(shape))
        elif len(group) > 1 and not inferred:
            sizes.append(-1)
            inferred = True
        elif len(group) == 1:
            sizes.append(size(rewriter, node, at))
        else:
            raise ValueError("two dynamic axes would be joined in two places")
        at += len(group)
    return rewriter.call(aten.reshape.default, node, sizes)


def expanded(rewriter: Rewriter, operand: Operand, names: Axes, sizes: dict[str, Any]) -> Operand:
    """The operand repeated along the named axes that it lacks, put in front."""
    missing = [name for name in names if name not in operand.axes]
    if not missing:
        return operand
    shape = [sizes[name] for name in missing] + [-1] * len(operand.axes)
    node = rewriter.call(aten.expand.default, operand.node, shape)
    return Operand(node, (*missing, *operand.axes))


def split(rewriter: Rewriter, operand: Operand, joined: str, parts: dict[str, Any]) -> Operand:
    """The operand with its axis ``joined`` as the two axes that it was joined from."""
    at = operand.axes.index(joined)
    node, axes = operand.node, (*operand.axes[:at], *parts, *operand.axes[at + 1 :])
    source = before_join(node, at, list(parts.values()))
    if source is not None:
        return Operand(source, axes)
    sizes: list[Any] = []
    for dim in range(node.meta["val"].dim()):
        sizes += _parts(list(parts.values())) if dim == at else [size(rewriter, node, dim)]
    return Operand(rewriter.call(aten.reshape.default, node, sizes), axes)


def _parts(sizes: list[Any]) -> list[Any]:
    return [n if isinstance(n, int) else -1 for n in sizes]


def before_join(node: fx.Node, at: int, sizes: list[Any]) -> fx.Node | None:
    """The value whose axes of these sizes a reshape joined at one place, or None."""
    if node.target is not aten.reshape.default or node.op != "call_function":
        return None
    source: Any = node.args[0]
    shape, result = list(source.meta["val"].shape), list(node.meta["val"].shape)
    expected = [*result[:at], *sizes, *result[at + 1 :]]
    same = len(shape) == len(expected) and all(map(same_size, shape, expected))
    return source if same else None
