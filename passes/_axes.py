"""Where values keep channels, and how operations pass them on: forwards, backwards, and their constants.

A layer's channels are followed through whatever lies between it and the layers that read them: activations,
sums and products, pools, reshapes that split heads, attention itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from graphopt.ir.graph import same_size
from graphopt.ir.pattern import argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._permutations import PERMUTATIONS, permutation

aten = torch.ops.aten


class Axis(NamedTuple):
    """The dimension of a value that keeps the units (channels, heads): ``outer * units * inner`` long.

    Args:
        dim: counted from the end: -1 is the last.
        outer: how often the units are repeated as a whole: 3 in a projection to queries, keys and values.
        inner: how many elements a unit has next to each other: the features of a head.
    """

    dim: int
    outer: int = 1
    inner: int = 1

    def moved(self, dim: int) -> Axis:
        """The same at another dimension."""
        return self._replace(dim=dim)


Found = Axis | str  # or the reason why the units cannot be followed


@dataclass(frozen=True)
class Rule:
    """How an operation passes units on.

    Args:
        ahead: (node, source, axis of the source, units) -> axis of the node.
        behind: (node, axis of the node, units) -> axes of those sources that keep the units.
        constant: what is known of the result, when something is known of the sources: "computed" by the
            operation itself, "kept", "zero" only, or "unknown".
    """

    ahead: Callable[[fx.Node, fx.Node, Axis, int], Found]
    behind: Callable[[fx.Node, Axis, int], dict[fx.Node, Axis] | str]
    constant: str


def shape(node: fx.Node) -> Any:
    """The shape of a value; of what comes in parts, that of its source."""
    val = node.meta["val"]
    return val.shape if isinstance(val, torch.Tensor) else node.all_input_nodes[0].meta["val"].shape


def fits(node: fx.Node, axis: Axis, units: int) -> bool:
    """True when the dimension has a fixed size that is made of the units."""
    sizes = shape(node)
    return -axis.dim <= len(sizes) and same_size(sizes[axis.dim], axis.outer * units * axis.inner)


def parts(node: fx.Node, axis: Axis) -> int:
    """How many values of the same kind a projection makes at once: 2 where it is split into gate and up."""
    if len(node.users) != 1:
        return 1
    (user,) = node.users
    if user.target not in (aten.split.Tensor, aten.split_with_sizes.default) or _part_dim(user) != axis.dim:
        return 1
    sizes = {part.shape[axis.dim] for part in user.meta["val"]}
    return len(user.meta["val"]) if len(sizes) == 1 else 1


def rule(node: fx.Node) -> Rule | None:
    """How a call passes units on, or None when it is not known to."""
    return _RULES.get(node.target) if node.op == "call_function" else None


def _tensors(node: fx.Node) -> Iterable[fx.Node]:
    return (s for s in node.all_input_nodes if isinstance(s.meta.get("val"), torch.Tensor))


def _no(node: fx.Node, does: str) -> str:
    return f"{node.name} {does} the channels"


# Element by element, operands broadcast


def _aligned(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    return axis if fits(node, axis, units) else _no(node, "repeats")


def _operands(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    found = {s: axis for s in _tensors(node) if fits(s, axis, units)}
    return found or _no(node, "makes all of")


# Dimensions that the operation works along


def mixed_dims(node: fx.Node) -> set[int] | None:
    """The dimensions, counted from the end in the source, that an operation mixes; None for all."""
    rank = len(shape(node.all_input_nodes[0]))
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        return {-1 - dim for dim in range(len(argument(node, "normalized_shape")))}
    if node.target in _PADS:
        pads: Any = argument(node, "pad")
        return {-1 - index // 2 for index, size in enumerate(pads) if size != 0}
    if node.target is aten.batch_norm.default:
        return {*range(-rank, 0)} - {1 - rank}
    if node.target in _SPATIAL:
        return {*range(-_SPATIAL[node.target], 0), -rank} - {-_SPATIAL[node.target] - 1}
    if node.target is aten.cat.default:
        return {argument(node, "dim") % len(shape(node)) - len(shape(node))}
    given: Any = argument(node, "dim")
    if given is None or given == []:
        return None
    return {dim % rank - rank for dim in (given if isinstance(given, (list, tuple)) else [given])}


def _beside(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    dims = mixed_dims(node)
    return _no(node, "mixes") if dims is None or axis.dim in dims else axis


def _beside_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    dims = mixed_dims(node)
    if dims is None or axis.dim in dims:
        return _no(node, "mixes")
    return {s: axis for s in _tensors(node) if fits(s, axis, units)}


def _normalised_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    x, *statistics = _tensors(node)
    found = _beside_behind(node, axis, units)
    return found if isinstance(found, str) else {x: axis, **dict.fromkeys(statistics, axis.moved(-1))}


def _reduced(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    dims = mixed_dims(node)
    if dims is None or axis.dim in dims:
        return _no(node, "mixes")
    return axis if _keeps_rank(node) else axis.moved(axis.dim + sum(dim > axis.dim for dim in dims))


def _reduced_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    source, dims = node.all_input_nodes[0], mixed_dims(node)
    if dims is None:
        return _no(node, "mixes")
    kept = [dim for dim in range(-len(shape(source)), 0) if _keeps_rank(node) or dim not in dims]
    at = axis.moved(kept[axis.dim])
    return _no(node, "mixes") if at.dim in dims else {source: at}


def _keeps_rank(node: fx.Node) -> bool:
    return len(shape(node)) == len(shape(node.all_input_nodes[0]))


# Views


def _permuted(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    order = permutation(node)
    assert order is not None
    return axis.moved(order.index(axis.dim + len(order)) - len(order))


def _permuted_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    order = permutation(node)
    assert order is not None
    return {node.all_input_nodes[0]: axis.moved(order[axis.dim] - len(order))}


def _reshaped(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    return _regrouped(shape(source), shape(node), axis, units) or _no(node, "splits or merges")


def _reshaped_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    source = node.all_input_nodes[0]
    found = _regrouped(shape(node), shape(source), axis, units)
    return _no(node, "splits or merges") if found is None else {source: found}


def _regrouped(before: Any, after: Any, axis: Axis, units: int) -> Axis | None:
    """Where the units are in a value of another shape with the same elements in the same order."""
    same = 0
    while same < min(len(before), len(after)) and same_size(before[-1 - same], after[-1 - same]):
        same += 1
    if axis.dim >= -same:  # behind everything that changes
        return axis
    rest = list(before[len(before) + axis.dim + 1 : len(before) - same])
    if not all(isinstance(size, int) for size in rest):
        return None
    inner = axis.inner * math.prod(rest)  # elements of a unit, in front of the dimensions that are the same
    for dim in range(-same - 1, -len(after) - 1, -1):
        size = after[dim]
        if not isinstance(size, int):
            return None
        if size and inner % size == 0:
            inner //= size
            continue
        outer, left = divmod(size, units * inner)
        return Axis(dim, outer, inner) if outer and not left else None
    return None


def _expanded_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    source = node.all_input_nodes[0]
    return {source: axis} if fits(source, axis, units) else _no(node, "makes all of")


def _repeated(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    times, dim = argument(node, "repeats"), argument(node, "dim")
    if dim is None or not isinstance(times, int):
        return _no(node, "repeats")
    along = dim % len(shape(node)) - len(shape(node)) == axis.dim
    return axis._replace(inner=axis.inner * times) if along else axis


def _repeated_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    source = node.all_input_nodes[0]
    once = _repeated(node, source, axis._replace(inner=1), units)
    if isinstance(once, str) or axis.inner % once.inner:
        return _no(node, "repeats")
    return {source: axis._replace(inner=axis.inner // once.inner)}


# Parts: split, and unbind where it does not cut the units


def _parted(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    if _part_dim(node) != axis.dim:
        return axis
    return axis if node.target is not aten.unbind.int and _parts(node, axis) else _no(node, "cuts")


def _parted_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    return {node.all_input_nodes[0]: axis}


def _part(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    if source.target is aten.unbind.int:
        return axis.moved(axis.dim + (_part_dim(source) > axis.dim))
    if _part_dim(source) != axis.dim:
        return axis
    return axis._replace(outer=axis.outer // len(source.meta["val"]))


def _part_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    source = node.all_input_nodes[0]
    if source.target is aten.unbind.int:
        return {source: axis.moved(axis.dim - (_part_dim(source) >= axis.dim))}
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return _no(source, "cuts")
    if _part_dim(source) != axis.dim:
        return {source: axis}
    whole = axis._replace(outer=axis.outer * len(source.meta["val"]))
    return {source: whole} if _parts(source, whole) else f"the parts of {source.name} differ in size"


def _part_dim(node: fx.Node) -> int:
    rank = len(shape(node))
    return int(argument(node, "dim") % rank - rank)


def _parts(node: fx.Node, axis: Axis) -> bool:
    """True when a split's parts are alike, each with all of the units."""
    sizes = {part.shape[axis.dim] for part in node.meta["val"]}
    return len(sizes) == 1 and axis.outer % len(node.meta["val"]) == 0


# Products of heads


def _batched(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    return axis if axis.dim < -2 and fits(node, axis, units) else _no(node, "mixes")


def _batched_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    return _operands(node, axis, units) if axis.dim < -2 else _no(node, "mixes")


def _heads(node: fx.Node) -> tuple[int, int]:
    """The dimension of an attention's heads, and how many query heads share a key head."""
    dim = -2 if node.target is ATTENTION.overload else -3
    query, key = (shape(source)[dim] for source in node.args[:2])  # type: ignore[arg-type]
    return dim, query // key if isinstance(query, int) and isinstance(key, int) else 0


def _attended(node: fx.Node, source: fx.Node, axis: Axis, units: int) -> Found:
    dim, shared = _heads(node)
    if axis.dim != dim or axis.outer != 1 or source not in node.args[:3] or not shared:
        return _no(node, "mixes")
    return axis if source is node.args[0] else axis._replace(inner=axis.inner * shared)


def _attended_behind(node: fx.Node, axis: Axis, units: int) -> dict[fx.Node, Axis] | str:
    dim, shared = _heads(node)
    if axis.dim != dim or axis.outer != 1 or not shared:
        return _no(node, "mixes")
    if axis.inner % shared:
        return f"{shared} query heads of {node.name} share a key head"
    query, key, value = node.args[:3]
    own = axis._replace(inner=axis.inner // shared)
    found: dict[Any, Axis] = {key: own, value: own, query: axis}
    mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask", node.kwargs.get("mask"))
    if mask is not None and fits(mask, axis.moved(-3), units):
        found[mask] = axis.moved(-3)
    return found


_PADS = (aten.constant_pad_nd.default, aten.pad.default)
_SPATIAL: dict[Any, int] = {  # dimensions of an image that an operation works along
    **dict.fromkeys((aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default), 1),
    **dict.fromkeys((aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default), 2),
    **dict.fromkeys((aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec), 2),
    **dict.fromkeys((aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default), 3),
}
ELEMENTWISE = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar),
    *(aten.maximum.default, aten.minimum.default, aten.pow.Tensor_Scalar, aten.square.default),
    *(aten.relu.default, aten.relu6.default, aten.leaky_relu.default, aten.elu.default, aten.selu.default),
    *(aten.gelu.default, aten.silu.default, aten.mish.default, aten.softplus.default, aten.celu.default),
    *(aten.sigmoid.default, aten.tanh.default, aten.erf.default, aten.exp.default, aten.abs.default),
    *(aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.log_sigmoid.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.neg.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.sin.default, aten.cos.default),
    *(aten.to.dtype, aten.dropout.default),
)
_KEEPING = ("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")

_computed = Rule(_aligned, _operands, "computed")
_along = Rule(_beside, _beside_behind, "unknown")
_reduction = Rule(_reduced, _reduced_behind, "kept")
_permute = Rule(_permuted, _permuted_behind, "kept")
_reshape = Rule(_reshaped, _reshaped_behind, "kept")
_split = Rule(_parted, _parted_behind, "kept")
_product = Rule(_batched, _batched_behind, "zero")
_attention = Rule(_attended, _attended_behind, "attended")

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _computed),
    **dict.fromkeys((aten.softmax.int, aten.layer_norm.default, aten.rms_norm.default), _along),
    **dict.fromkeys(_PADS, Rule(_beside, _beside_behind, "zero")),
    **{
        op: Rule(_beside, _beside_behind, "kept" if op._schema.name.split("::")[1] in _KEEPING else "zero")
        for op in _SPATIAL
    },
    aten.batch_norm.default: Rule(_beside, _normalised_behind, "normalised"),
    **dict.fromkeys((aten.slice.Tensor, aten.cat.default), Rule(_beside, _beside_behind, "zero")),
    **dict.fromkeys((aten.mean.dim, aten.amax.default, aten.amin.default, aten.select.int), _reduction),
    aten.sum.dim_IntList: Rule(_reduced, _reduced_behind, "zero"),
    **dict.fromkeys(PERMUTATIONS, _permute),
    **dict.fromkeys((aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim), _reshape),
    aten.expand.default: Rule(_aligned, _expanded_behind, "kept"),
    aten.repeat_interleave.self_int: Rule(_repeated, _repeated_behind, "kept"),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int), _split),
    operator.getitem: Rule(_part, _part_behind, "part"),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _product),
    aten.scaled_dot_product_attention.default: _attention,
    ATTENTION.overload: _attention,
}
