"""What reads real tokens only: choices, products and picks by a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.attention import SWALLOWS
from graphopt.kernels.masked_mean_pool import OP as MASKED_MEAN_POOL
from graphopt.passes._packing import attended_tokens, masks_keys, says_the_same, token_mask

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """A call that reads real tokens only.

    Args:
        values: of which it reads no padded position.
        by: what tells it which those are; the mask itself, or made of it.
        mask: the (batch, length) value whose nonzero elements are the real tokens.
        guarded: true only where every sequence begins with a token that the mask marks with 1.
    """

    values: tuple[fx.Node, ...]
    by: fx.Node
    mask: fx.Node
    guarded: bool = False


def read(graph: Graph, node: fx.Node) -> Read | None:
    """What a call reads of a sequence's tokens; None where it may read padded ones."""
    kinds = (_mean, _chosen, _multiplied, _first, _first_real, _attended)
    return next((found for kind in kinds if (found := kind(graph, node)) is not None), None)


def _mean(graph: Graph, node: fx.Node) -> Read | None:
    if node.target is not MASKED_MEAN_POOL.overload:
        return None
    x, by = node.args[:2]
    mask = token_mask(by)
    return None if mask is None else Read((x,), by, mask)  # type: ignore[arg-type]


def _chosen(graph: Graph, node: fx.Node) -> Read | None:
    """A number, the same for all, instead of padded positions: zero, or what no maximum takes."""
    condition: Any
    if node.target is aten.where.ScalarOther:
        condition, x = node.args[:2]
        mask = token_mask(condition)
    elif node.target is aten.where.ScalarSelf:
        (condition, _, x), mask = node.args[:3], _unless(node.args[0])
    elif node.target is aten.masked_fill.Scalar:
        (x, condition), mask = node.args[:2], _unless(node.args[1])
    else:
        return None
    fits = mask is not None and _fits(x, node, condition)
    return Read((x,), condition, mask) if fits else None  # type: ignore[arg-type]


def _unless(condition: Any) -> fx.Node | None:
    """The mask that is zero where a condition is true."""
    if not isinstance(condition, fx.Node):
        return None
    source = condition.args[0] if condition.args else None
    if condition.target in _VIEWS and isinstance(source, fx.Node) and says_the_same(condition, source):
        return _unless(source)
    if condition.target is aten.eq.Scalar and condition.args[1] == 0:
        return token_mask(condition.args[0])
    if condition.target is aten.logical_not.default:
        return token_mask(condition.args[0])
    if condition.target is aten.bitwise_not.default and condition.meta["val"].dtype == torch.bool:
        return token_mask(condition.args[0])
    return None


def _multiplied(graph: Graph, node: fx.Node) -> Read | None:
    """A factor that is zero at padded positions, perhaps a weight elsewhere."""
    if node.target is not aten.mul.Tensor:
        return None
    for x, factor in (node.args, node.args[::-1]):
        if isinstance(factor, fx.Node) and isinstance(x, fx.Node) and _fits(x, node, factor):
            mask = _vanishing(factor) if _has_features(x) else None
            if mask is not None:
                return Read((x,), factor, mask)
    return None


def _vanishing(node: fx.Node) -> fx.Node | None:
    """The mask that a value is zero with."""
    mask = token_mask(node)
    if mask is not None or node.target is not aten.mul.Tensor:
        return mask
    factors = [side for side in node.args if isinstance(side, fx.Node) and _is_column(side, node)]
    return next((mask for side in factors if (mask := _vanishing(side)) is not None), None)


def _is_column(factor: fx.Node, node: fx.Node) -> bool:
    """True for a factor with a value for each token, which is not repeated along them."""
    sizes, whole = factor.meta["val"].shape, node.meta["val"].shape
    return len(sizes) == len(whole) and same_size(sizes[1], whole[1])


def _has_features(x: fx.Node) -> bool:
    """True for what may be worth packing: a weight of each token is not."""
    value = x.meta["val"]
    return value.dim() >= 3 and value.is_floating_point() and not same_size(value.shape[-1], 1)


def _fits(x: Any, node: fx.Node, by: Any) -> bool:
    """True where x gives the result its shape, (batch, length, ...), and ``by`` has values for each token."""
    if not isinstance(x, fx.Node) or not isinstance(by, fx.Node):
        return False
    value, whole = x.meta["val"], node.meta["val"]
    return value.dim() >= 2 and same_shape(value.shape, whole.shape) and _is_column(by, node)


def _first(graph: Graph, node: fx.Node) -> Read | None:
    """The first position of each sequence."""
    if node.target is aten.select.int:
        takes = argument(node, "index") == 0 and argument(node, "dim") == 1
    elif node.target is aten.slice.Tensor and argument(node, "dim") == 1:
        takes = argument(node, "start") in (0, None) and argument(node, "end") == 1
    else:
        return None
    x: Any = node.args[0]
    mask = attended_tokens(graph) if takes and _holds_tokens(x) else None
    given = mask is not None and mask.op == "placeholder"
    return Read((x,), mask, mask, guarded=True) if given else None  # type: ignore[arg-type]


def _first_real(graph: Graph, node: fx.Node) -> Read | None:
    """The first of the positions that the mask marks most: a real one, where it marks any with 1.

    Whatever its values become in a cast, 1 stays 1 and 0 stays 0: the largest is not that of padding.
    """
    if node.target is not aten.gather.default or node.args[1] != 1 or not _holds_tokens(node.args[0]):
        return None
    index: Any = node.args[2]
    mask, most = attended_tokens(graph), index
    while isinstance(most, fx.Node) and most.target in _VIEWS:
        most = most.args[0]
    if mask is None or not isinstance(most, fx.Node) or most.target is not aten.argmax.default:
        return None
    marks: Any = most.args[0]
    while marks is not mask and isinstance(marks, fx.Node) and marks.target is aten.to.dtype:
        marks = marks.args[0]
    by_sequence = same_size(index.meta["val"].shape[1], 1) and argument(most, "dim") == 1
    given = mask.op == "placeholder" and marks is mask
    return Read((node.args[0],), index, mask, guarded=True) if by_sequence and given else None  # type: ignore[arg-type]


def _attended(graph: Graph, node: fx.Node) -> Read | None:
    """One query's keys and values, of which the mask leaves only real tokens: an empty sequence has none."""
    if node.target is not ATTENTION.overload or not same_size(node.meta["val"].shape[1], 1):
        return None
    by, fill = argument(node, "mask"), argument(node, "fill")
    key: Any = node.args[1]
    if by is None or by.meta["val"].dtype != torch.bool or argument(node, "is_causal"):
        return None
    swallowed = fill is None or fill <= SWALLOWS
    mask = token_mask(by) if swallowed and masks_keys(by, key.meta["val"].shape) else None
    return None if mask is None else Read(node.args[1:3], by, mask, guarded=True)  # type: ignore[arg-type]


def _holds_tokens(x: Any) -> bool:
    """True for what a layer computes for each token."""
    value = x.meta["val"]
    return bool(x.op == "call_function" and value.dim() == 3 and value.is_floating_point())


def between(mask: fx.Node, by: fx.Node) -> set[fx.Node]:
    """The calls that lie between a mask and what is made of it, that one included."""
    found: dict[fx.Node, bool] = {mask: True}
    work = [by]
    while work:
        node = work[-1]
        waiting = [
            source for source in node.all_input_nodes if source not in found and source.op != "get_attr"
        ]
        if waiting and node not in found:
            work += waiting
            continue
        work.pop()
        found.setdefault(node, any(found.get(source, False) for source in node.all_input_nodes))
    return {node for node, made in found.items() if made and node is not mask}


_VIEWS = (
    *(aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim),
    aten.to.dtype,
)
