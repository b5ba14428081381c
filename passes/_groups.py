"""The groups of channels and of heads in a graph, and those of them that add nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._axes import Axis, fits, parts, shape
from graphopt.passes._channels import Group, follow, layer
from graphopt.passes._permutations import PERMUTATIONS

aten = torch.ops.aten

_REPEATS = (aten.reshape.default, aten.transpose.int, aten.permute.default, aten.expand.default)


def channels(graph: Graph) -> Iterator[Group]:
    """The groups of single channels, each once, from the layers that make them."""
    seen: set[fx.Node] = set()
    for node in graph.calls:
        one = None if node._erased or node in seen else layer(graph, node)
        if one is None:
            continue
        outer, size = parts(node, Axis(one.dim)), shape(one.weight)[one.made]
        if size > outer and fits(node, Axis(one.dim), size):
            group = follow(graph, node, Axis(one.dim, outer), size // outer)
            seen.update(group.made)
            yield group


def heads(graph: Graph) -> Iterator[Group]:
    """The heads of every attention, from the node that mixes values; grouped heads by their key head."""
    for node in graph.calls:
        if node._erased or node.target not in _HEADS or len(shape(node)) != 4:
            continue
        dim, key = _HEADS[node.target]
        count, shared = shape(node)[dim], _shared(node, key)
        if isinstance(count, int) and count > shared and count % shared == 0:
            yield follow(graph, node, Axis(dim, 1, shared), count // shared)


_HEADS: dict[Any, tuple[int, int | None]] = {  # the dimension of the heads, the argument with the keys
    aten.scaled_dot_product_attention.default: (-3, 1),
    ATTENTION.overload: (-2, 1),
    aten.softmax.int: (-3, None),
}


def _shared(node: fx.Node, key: int | None) -> int:
    """How many query heads read one key head."""
    source: Any = node.all_input_nodes[0]
    if key is not None:
        source = node.args[key]
        dim = _HEADS[node.target][0]
        if shape(source)[dim] != shape(node)[dim]:
            return int(shape(node)[dim] // shape(source)[dim])
    elif source.target in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
        source = source.all_input_nodes[0]
    if source.target in (aten.matmul.default, aten.bmm.default):
        source = source.args[1]
    while source.op == "call_function" and source.target in _REPEATS:
        behind = source.all_input_nodes[0]
        if source.target is aten.expand.default:
            grown = [
                after
                for before, after in zip(reversed(shape(behind)), reversed(shape(source)), strict=False)
                if before == 1 and isinstance(after, int)
            ]
            return max(grown, default=1)
        source = behind
    if source.target is aten.repeat_interleave.self_int:
        return int(argument(source, "repeats"))
    return 1


def idle(graph: Graph, groups: Iterable[Group]) -> Iterator[Match]:
    """The groups with units that add nothing; of those that cannot be removed, with zeros in a layer."""
    for group in groups:
        if group.refusal is not None:
            zero = group.unmade() | group.unread()
        else:
            zero = group.idle()
            if not zero.any() and (stacked := _stacked(group)):
                group.refuse(stacked)
                zero = group.unmade(every_part=False)
        if zero.any() and (group.made or group.read):
            nodes = group.nodes if group.refusal is None else (min({*group.made, *group.read}),)
            yield Match(graph, nodes[-1], nodes, {"group": group, "zero": zero})


def _stacked(group: Group) -> str | None:
    """Why zeros in one of the parts that a layer makes are not seen, or None.

    What is known of parts that are split is known behind the split; of parts that a reshape gives a dimension
    of their own, behind what takes them out one by one.
    """
    for node, axis in group.axes.items():
        source = node.all_input_nodes[0]
        parts = group.axes[source].outer if source in group.axes else 1
        if node.target is aten.reshape.default and parts > axis.outer and not _taken_apart(node):
            return f"{node.name} stacks {parts} parts of one projection, which are not told apart"
    return None


def _taken_apart(node: fx.Node) -> bool:
    return all(
        user.target in (aten.unbind.int, aten.select.int)
        or (user.target in PERMUTATIONS and _taken_apart(user))
        for user in node.users
    )
