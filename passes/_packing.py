"""Packed tokens: whose they are, how a value is packed, and how operations pass them on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.op import Op
from graphopt.ir.pattern import argument
from graphopt.kernels import (
    add_layer_norm,
    add_rms_norm,
    embedding_layer_norm,
    gated_mlp,
    layer_norm_add,
    linear_activation,
    linear_add_layer_norm,
    quantized_linear,
    quick_gelu,
    rms_norm,
    rms_norm_add,
    rope,
    sandwich_rms_norm,
)
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.pack_tokens import OP as PACK
from graphopt.passes._axes import shape
from graphopt.passes._tokens import behind

aten = torch.ops.aten


class Spot(NamedTuple):
    """Where a value has sequences and tokens: dimensions counted from the end, None where it is broadcast."""

    batch: int | None
    token: int | None

    @staticmethod
    def leading(rank: int) -> Spot:
        """The first two dimensions."""
        return Spot(-rank, 1 - rank)


# The mask


def token_mask(node: Any) -> fx.Node | None:
    """The (batch, length) value whose nonzero elements a mask says; None for any other mask.

    Followed through are casts that keep what is zero, and dimensions put in front or in between: a mask of
    keys, (batch, 1, 1, length), says of every query the same.
    """
    while isinstance(node, fx.Node) and node.op == "call_function":
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not says_the_same(node, source):
            break
        node = source
    fits = isinstance(node, fx.Node) and isinstance(node.meta["val"], torch.Tensor)
    return node if fits and node.meta["val"].dim() == 2 else None


def says_the_same(node: fx.Node, source: fx.Node) -> bool:
    """True for a view that only adds dimensions, and for a cast that keeps zeros and nothing else zero."""
    before, after = source.meta["val"], node.meta["val"]
    if node.target is aten.ne.Scalar:
        return bool(node.args[1] == 0)
    if node.target is aten.to.dtype:
        return _keeps_zeros(before.dtype, after.dtype)
    if node.target in (aten.unsqueeze.default, aten.reshape.default, aten.squeeze.dim, aten.expand.default):
        repeats = _repeats_queries(before, after) or _repeats_features(before, after)
        return repeats or same_shape(_real(before), _real(after))
    if node.target is aten.slice.Tensor:
        return same_shape(before.shape, after.shape)
    return False


def _keeps_zeros(before: torch.dtype, after: torch.dtype) -> bool:
    """True when a cast makes nothing zero that was not: a small number underflows, a large one wraps."""
    if before == torch.bool or after == torch.bool or before == after:
        return True
    if before.is_floating_point:
        return after.is_floating_point and after.itemsize > before.itemsize
    return after.is_floating_point or after.itemsize > before.itemsize


def _real(val: torch.Tensor) -> list[Any]:
    """The sizes other than 1."""
    return [size for size in val.shape if not same_size(size, 1)]


def _repeats_queries(before: torch.Tensor, after: torch.Tensor) -> bool:
    """True for (batch, 1, 1, keys) expanded along heads and queries."""
    if before.dim() != 4 or after.dim() != 4:
        return False
    ends = (0, 3)
    return all(same_size(before.shape[i], 1) for i in (1, 2)) and all(
        same_size(before.shape[i], after.shape[i]) for i in ends
    )


def _repeats_features(before: torch.Tensor, after: torch.Tensor) -> bool:
    """True for (batch, length, 1) expanded along a token's features."""
    if before.dim() != 3 or after.dim() != 3:
        return False
    return same_size(before.shape[2], 1) and same_shape(before.shape[:2], after.shape[:2])


def masks_keys(mask: fx.Node, keys: Sequence[Any]) -> bool:
    """True for a mask that says of every query and head the same: (batch, 1 or heads, 1 or queries, keys)."""
    sizes = mask.meta["val"].shape
    return len(sizes) == 4 and same_size(sizes[0], keys[0]) and same_size(sizes[3], keys[1])


def attended_tokens(graph: Graph) -> fx.Node | None:
    """The mask of tokens that the graph's first attention with one attends to."""
    for node in graph.fx.find_nodes(op="call_function", target=ATTENTION.overload):
        mask = argument(node, "mask")
        tokens = token_mask(mask)
        if tokens is not None and masks_keys(mask, node.args[1].meta["val"].shape):
            return tokens
    return None


# What is made of the mask


def shared(rewriter: Rewriter, target: Callable[..., Any], source: fx.Node, *args: Any) -> fx.Node:
    """A call, which is staged unless the graph has it already."""
    for user in source.users:
        if user.target is target and user.args == (source, *args) and not user.kwargs:
            return user
    return rewriter.call(target, source, *args)


def as_condition(rewriter: Rewriter, mask: fx.Node) -> fx.Node:
    """A mask as bool."""
    is_bool = mask.meta["val"].dtype == torch.bool
    return mask if is_bool else shared(rewriter, aten.to.dtype, mask, torch.bool)


def indices_of(rewriter: Rewriter, condition: fx.Node) -> fx.Node:
    """Where a mask of bool is True, (tokens,), row by row."""
    flat = shared(rewriter, aten.reshape.default, condition, [-1])
    return shared(rewriter, aten.squeeze.dim, shared(rewriter, aten.nonzero.default, flat), 1)


def condition_of(indices: Any) -> fx.Node | None:
    """The mask that indices were made of; None when they were not made by ``indices_of``."""
    node = indices
    for target in (aten.squeeze.dim, aten.nonzero.default, aten.reshape.default):
        if not isinstance(node, fx.Node) or node.target is not target:
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def made_from(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The calls from a value to what is made of it alone, in order: a chain of first arguments."""
    chain = []
    while node is not source:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return chain[::-1]


_OF_MASKS = (aten.to.dtype, aten.reshape.default, aten.nonzero.default, aten.squeeze.dim)
_OF_COUNTS = (
    *(aten.to.dtype, aten.to.dtype, aten.sum.dim_IntList),
    *(aten.cumsum.default, aten.constant_pad_nd.default, aten.to.dtype),
)


def already_made(mask: fx.Node) -> set[fx.Node]:
    """What the graph holds of a mask's indices and offsets.

    A rewrite that may read them counts them to its region: as inputs they would be varied on their own.
    """
    return {node for chain in (_OF_MASKS, _OF_COUNTS) for node in _chained(mask, chain)}


def packs_of(values: Collection[fx.Node], packs: Collection[fx.Node]) -> set[fx.Node]:
    """Those packs that pack one of the values, and the views of it that they pack: likewise counted."""
    found = set()
    for pack in packs:
        source: Any = pack.args[0]
        if source in values:
            found.add(pack)
        elif source.target in (aten.expand.default, aten.permute.default) and source.args[0] in values:
            found |= {source, pack}
    return found


def _chained(mask: fx.Node, targets: Sequence[Any]) -> set[fx.Node]:
    """The calls that follow a value, each of the next target or of the one before."""
    found: set[fx.Node] = set()
    work = [(mask, 0)]
    while work:
        node, at = work.pop()
        for user in node.users:
            step = next((i for i in range(at, len(targets)) if user.target is targets[i]), None)
            if step is not None and user.args[0] is node and user not in found:
                found.add(user)
                work.append((user, step + 1))
    return found


def offsets_of(rewriter: Rewriter, condition: fx.Node) -> fx.Node:
    """Where each sequence begins among packed tokens, and where the last one ends: (batch + 1,), int32."""
    ones = shared(rewriter, aten.to.dtype, condition, torch.int32)
    counts = shared(rewriter, aten.sum.dim_IntList, ones, [1])
    ends = shared(rewriter, aten.cumsum.default, counts, 0)
    padded = shared(rewriter, aten.constant_pad_nd.default, ends, [1, 0])
    return shared(rewriter, aten.to.dtype, padded, torch.int32)


def is_offsets(node: Any, condition: fx.Node) -> bool:
    """True for what ``offsets_of`` makes of a mask."""
    steps: tuple[tuple[Any, Any], ...] = (
        (aten.to.dtype, torch.int32),
        (aten.constant_pad_nd.default, [1, 0]),
        (aten.cumsum.default, 0),
        (aten.sum.dim_IntList, [1]),
        (aten.to.dtype, torch.int32),
    )
    for target, argument_ in steps:
        if not isinstance(node, fx.Node) or node.target is not target or node.kwargs:
            return False
        if node.args[1:] != (argument_,):
            return False
        node = node.args[0]
    return node is condition


def sizes_of(rewriter: Rewriter, node: fx.Node, dims: Sequence[int]) -> list[Any]:
    """A value's sizes, as numbers where they are fixed and as nodes where they are not."""
    sizes = node.meta["val"].shape
    return [
        sizes[dim] if isinstance(sizes[dim], int) else shared(rewriter, aten.sym_size.int, node, dim)
        for dim in dims
    ]


# Packing values


def packed(rewriter: Rewriter, node: fx.Node, spot: Spot, indices: fx.Node) -> fx.Node:
    """The packed tokens of a value, at the same dimensions."""
    condition = condition_of(indices)
    assert condition is not None
    rank = node.meta["val"].dim()
    if None in spot:
        sizes: list[Any] = [-1] * rank
        for dim, size in zip(spot_in(node, spot), sizes_of(rewriter, condition, (0, 1)), strict=True):
            sizes[dim] = size
        node, spot = shared(rewriter, aten.expand.default, node, sizes), Spot(*spot_in(node, spot))
    at = [dim % rank for dim in spot if dim is not None]
    if at == [0, 1]:
        return shared(rewriter, PACK.overload, node, indices)
    order = [*at, *(dim for dim in range(rank) if dim not in at)]
    first = shared(rewriter, PACK.overload, shared(rewriter, aten.permute.default, node, order), indices)
    return rewriter.call(aten.permute.default, first, [order.index(dim) for dim in range(rank)])


def spot_in(node: fx.Node, spot: Spot) -> tuple[int, int]:
    """The dimensions of sequences and tokens, broadcast ones included: sequences lie in front of tokens."""
    rank = len(shape(node))
    if spot.token is None:
        assert spot.batch is not None
        return spot.batch, spot.batch + 1
    return (-rank if spot.batch is None else spot.batch), spot.token


# What passes tokens on

_names: dict[Any, tuple[Op, tuple[str, ...]]] = {
    op.overload: (op, names)
    for op, names in (
        (add_layer_norm.OP, ("x", "residual")),
        (add_rms_norm.OP, ("x", "residual")),
        (embedding_layer_norm.OP, ("input_ids", "position_ids", "token_type_ids")),
        (gated_mlp.OP, ("x",)),
        (layer_norm_add.OP, ("x", "residual")),
        (linear_activation.OP, ("x", "residual")),
        (linear_add_layer_norm.OP, ("x", "residual")),
        (quantized_linear.OP, ("x",)),
        (quick_gelu.OP, ("x",)),
        (rms_norm.OP, ("x",)),
        (rms_norm_add.OP, ("x", "residual")),
        (rope.OP, ("x", "cos", "sin")),
        (sandwich_rms_norm.OP, ("x", "residual")),
    )
}


def sources(node: fx.Node, spot: Spot) -> dict[fx.Node, Spot] | None:
    """The sources of which a call takes, for each token, that token alone; None where it mixes tokens.

    Args:
        node: a call.
        spot: where its value has sequences and tokens.
    """
    if node.op != "call_function" or None in spot or node.target is ATTENTION.overload:
        return None
    if node.target in _names:
        return _named(node, spot)
    if node.target is operator.getitem and node.all_input_nodes[0].target in _names:
        return {node.all_input_nodes[0]: spot}
    assert spot.batch is not None
    assert spot.token is not None
    if node.target is aten.reshape.default and not _resizes(node, spot):
        return None
    tokens = behind(node, spot.token, last=False)
    single = same_size(shape(node)[spot.batch], 1)
    rows = {} if single else behind(node, spot.batch, last=False)
    if tokens is None or rows is None:
        return None
    return {source: Spot(rows.get(source), tokens.get(source)) for source in {**tokens, **rows}}


def _named(node: fx.Node, spot: Spot) -> dict[fx.Node, Spot] | None:
    """The arguments that hold a token's own values, of an op that works along the dimensions behind it."""
    whole = shape(node)
    found: dict[fx.Node, Spot] = {}
    for name in _names[node.target][1]:
        source = argument(node, name)
        if source is None:
            continue
        sizes = shape(source)
        if len(sizes) < 2 and len(whole) > 1:
            continue  # one value for all tokens
        if len(sizes) < 2 or not same_size(sizes[1], whole[1]):
            return None
        same = same_size(sizes[0], whole[0])
        if not same and not same_size(sizes[0], 1):
            return None
        found[source] = Spot(-len(sizes) if same else None, 1 - len(sizes))
    return found if spot == Spot.leading(len(whole)) else None


def _resizes(node: fx.Node, spot: Spot) -> bool:
    """True when all sizes but those of sequences and tokens are known."""
    sizes = shape(node)
    kept = {dim % len(sizes) for dim in spot if dim is not None}
    return all(isinstance(size, int) for dim, size in enumerate(sizes) if dim not in kept)


def with_tokens(node: fx.Node, spot: Spot) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that is made for packed tokens: one sequence, of any length."""
    if node.target is not aten.reshape.default:
        return node.args, dict(node.kwargs)
    sizes = list(shape(node))
    assert spot.batch is not None
    assert spot.token is not None
    sizes[spot.batch], sizes[spot.token] = 1, -1
    return (node.args[0], sizes), {}


def region(packs: Sequence[fx.Node]) -> dict[fx.Node, Spot]:
    """Everything that only leads to packs of the same tokens, backwards, as long as tokens are not mixed."""
    found: dict[fx.Node, Spot] = {}
    needed: dict[fx.Node, dict[fx.Node, Spot]] = {}
    for pack in packs:
        source: Any = pack.args[0]
        needed.setdefault(source, {})[pack] = Spot.leading(source.meta["val"].dim())
    work = set(needed)
    while work:
        node = max(work)  # the latest: all that reads it has been looked at
        work.remove(node)
        spots = set(needed[node].values())
        if set(node.users) != set(needed[node]) or len(spots) != 1:
            continue
        spot = spots.pop()
        behind_it = sources(node, spot)
        if not behind_it:
            continue
        found[node] = spot
        for other, its in behind_it.items():
            if other not in needed:
                work.add(other)
            needed.setdefault(other, {})[node] = its
    _keep_whole(found)
    return found


def _keep_whole(found: dict[fx.Node, Spot]) -> None:
    """A call with several results gives all of them, or none."""
    for node in sorted(found):
        if node.target is operator.getitem and node.all_input_nodes[0] not in found:
            del found[node]


def packs_by_tokens(graph: Graph) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Indices, each with all packs that take them."""
    found: dict[Any, list[fx.Node]] = {}
    for pack in graph.fx.find_nodes(op="call_function", target=PACK.overload):
        found.setdefault(pack.args[1], []).append(pack)
    return list(found.items())
