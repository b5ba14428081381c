"""Packed tokens in buckets: a size that depends on the values of a mask, rounded up to one of few.

``nonzero`` gives as many indices as the mask has tokens. With a size of its own it gives so many as it is
told to; those behind the last token name a real position, and rows that are made of them are computed like
all others and read by nobody. Whether that is so, ``mark`` records: it is proved where the graph is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph
from graphopt.runtime.tokens import tokens_of

aten = torch.ops.aten

_SPARE = "graphopt_spare_rows"  # in a nonzero's meta: who reads rows behind the last token, None for nobody
_FEWEST = 64  # tokens: the rows of the smallest tile of a product, which takes as long for fewer
_STEPS = 32  # buckets from a power of two to the next: at most 3 % of the rows are spare


def bucket_of(tokens: int, most: int) -> int:
    """The rows in which so many tokens are computed.

    Args:
        tokens: how many there are.
        most: how many there can be, which is a bucket as well.
    """
    tokens = max(tokens, 1)
    step = max(_FEWEST, (1 << max((tokens - 1).bit_length() - 1, 0)) // _STEPS)
    return min(-(-tokens // step) * step, most)


def mark(nonzero: fx.Node, reader: str | None) -> None:
    """Record whether a nonzero may give more indices than there are tokens.

    Args:
        nonzero: the call.
        reader: what would read rows behind the last token, in words; None where nothing does.
    """
    if reader is None and _mask_of(nonzero) is None:
        reader = "its mask is computed, not given"
    nonzero.meta[_SPARE] = reader


def varying_sizes(node: fx.Node) -> str | None:
    """Why sizes of a call's results are not known before it runs; None where they are, or have buckets."""
    found = _unbacked([node])
    if not found:
        return None
    calls = node.graph.find_nodes(op="call_function", target=aten.nonzero.default)
    marked = [call for call in calls if _SPARE in call.meta]
    if found <= _unbacked([call for call in marked if call.meta[_SPARE] is None]):
        return None
    readers = {call.meta[_SPARE] for call in marked if call.meta[_SPARE] is not None}
    return "; ".join(["depends on values", *sorted(readers)])


def fix_sizes(graph: Graph) -> list[int]:
    """Give every marked nonzero a size, which becomes an input behind all others, in place.

    Args:
        graph: of a region.

    Returns:
        For each size the place of the mask, among the inputs, whose tokens it counts.

    Raises:
        LoweringError: a mask is computed inside the region.
    """
    given = graph.placeholders
    masks = []
    last = given[-1] if given else None
    for nonzero in graph.fx.find_nodes(op="call_function", target=aten.nonzero.default):
        if nonzero.meta.get(_SPARE, "") is not None:
            continue
        mask = _mask_of(nonzero)
        if mask is None or last is None:
            raise LoweringError(f"the mask of {nonzero.name} is computed inside the region")
        masks.append(given.index(mask))
        with graph.fx.inserting_after(last):
            last = graph.fx.placeholder(f"{nonzero.name}_size")
        last.meta["val"] = nonzero.meta["val"].shape[0]
        _give_size(graph, nonzero, last)
    graph.module.recompile()
    return masks


def sizes_of(inputs: Sequence[torch.Tensor], masks: Sequence[int]) -> tuple[int, ...]:
    """The buckets of a call, one a size; the inputs at these places are masks."""
    return tuple(bucket_of(tokens_of(inputs[at]).real, inputs[at].numel()) for at in masks)


def _give_size(graph: Graph, nonzero: fx.Node, size: fx.Node) -> None:
    kwargs: dict[str, Any] = {"size": size, "fill_value": 0}
    with graph.fx.inserting_before(nonzero):
        static = graph.fx.call_function(aten.nonzero_static.default, nonzero.args, kwargs)
    static.meta = dict(nonzero.meta)
    nonzero.replace_all_uses_with(static)
    graph.fx.erase_node(nonzero)
    static.name = nonzero.name


def _mask_of(nonzero: fx.Node) -> fx.Node | None:
    """The input that a nonzero's argument is a view of, or the truth of; None where there is none such."""
    node = nonzero.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function":
        true = node.target is aten.to.dtype and node.args[1] == torch.bool
        if not true and node.target is not aten.reshape.default:
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "placeholder" else None


def _unbacked(nodes: Sequence[fx.Node]) -> set[Any]:
    """The symbols that stand for sizes that depend on values."""
    leaves = torch.utils._pytree.tree_leaves([node.meta["val"] for node in nodes])
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return {symbol for tensor in tensors for symbol in free_unbacked_symbols(tensor)}
