"""Layers whose weights are constants: projections, convolutions, lookups, seen as one form of weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import argument, arguments
from graphopt.kernels._shape import memory_format

aten = torch.ops.aten

CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),  # "same", "valid"
)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_KIND = {
    aten.linear.default: "projection",
    aten.embedding.default: "lookup",
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), "convolution"),
}


@dataclass(frozen=True)
class Layer:
    """A call that multiplies by a weight.

    Args:
        graph: where it stands.
        node: the call.
        weight: its weight's node.
        bias: its bias's node, or None.
    """

    graph: Graph
    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def kind(self) -> str:
        """What to call it in a remark."""
        target: Any = self.node.target
        return _KIND[target]

    @property
    def source(self) -> fx.Node:
        """The value that it multiplies, or the ids that it looks up."""
        found: fx.Node = argument(self.node, "indices" if self.kind == "lookup" else "input")
        return found

    @property
    def groups(self) -> int:
        """How many groups of channels do not see each other."""
        return int(argument(self.node, "groups")) if self.kind == "convolution" else 1

    @property
    def channels(self) -> int:
        """How many channels it makes."""
        rows, columns = self.weight.meta["val"].shape[:2]
        if self.node.target in TRANSPOSED:
            return int(columns) * self.groups
        return int(columns if self.kind == "lookup" else rows)

    def channel_dim(self, rank: int) -> int:
        """The dimension of the channels in an input or result of that rank."""
        if self.kind != "convolution":
            return rank - 1
        return rank - int(self.weight.meta["val"].dim() - 1)

    def constants(self) -> str | None:
        """Why weight and bias cannot be changed now, or None."""
        if self.graph.constant(self.weight) is None:
            return "w is not a constant"
        if self.bias is not None and self.graph.constant(self.bias) is None:
            return "b is not a constant"
        return None

    def wide_weight(self) -> torch.Tensor:
        """The weight in float64 as (groups, channels out, channels in, kernel positions), each a group's."""
        weight = self.graph.constant(self.weight)
        assert weight is not None
        wide, groups = weight.double(), self.groups
        if self.kind == "lookup":
            return wide.t()[None, :, :, None]
        if self.node.target in TRANSPOSED:
            return wide.reshape(groups, -1, weight.shape[1], wide[0, 0].numel()).transpose(1, 2)
        return wide.reshape(groups, -1, weight.shape[1], wide[0, 0].numel())

    def wide_bias(self) -> torch.Tensor | None:
        """The bias in float64, one number a channel out."""
        bias = self.graph.constant(self.bias)
        return None if bias is None else bias.double()

    def narrow_weight(self, wide: torch.Tensor) -> torch.Tensor:
        """Undo ``wide_weight``; filters stay channels last, so that nobody has to turn them at each call."""
        like = self.graph.constant(self.weight)
        assert like is not None
        if self.kind == "lookup":
            wide = wide[0, :, :, 0].t()
        elif self.node.target in TRANSPOSED:
            wide = wide.transpose(1, 2)
        narrow = wide.reshape(like.shape).to(like.dtype)
        return narrow.contiguous(memory_format=memory_format(like))

    def pads(self) -> bool:
        """True when the border of a result sees fewer pixels than its middle: the rest is zeros."""
        if self.kind != "convolution":
            return False
        if self.node.target in TRANSPOSED:
            return True
        padding = argument(self.node, "padding")
        if isinstance(padding, str):
            return padding == "same" and any(size > 1 for size in self.weight.meta["val"].shape[2:])
        return any(size != 0 for size in padding)


def layer_of(graph: Graph, node: Any) -> Layer | None:
    """The layer that a node is, its weight and bias constant or not; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in _KIND:
        return None
    given = arguments(node)
    weight = given["weight"][0]
    if not weight.meta["val"].dtype.is_floating_point or weight.meta["val"].dim() < 2:
        return None
    if node.meta["val"].dtype != weight.meta["val"].dtype:
        return None
    return Layer(graph, node, weight, given["bias"][0] if "bias" in given else None)


def with_arguments(rewriter: Rewriter, node: fx.Node, **changes: Any) -> fx.Node:
    """Stage the same call with other arguments; those at the end that have their defaults are left out."""
    given = {name: (changes.get(name, value), default) for name, (value, default) in arguments(node).items()}
    named = {a.name for a in node.target._schema.arguments if a.kwarg_only}  # type: ignore[union-attr]
    pairs = [pair for name, pair in given.items() if name not in named]
    while pairs and _is_default(*pairs[-1]):
        pairs.pop()
    kwargs = {name: given[name][0] for name in given if name in named and not _is_default(*given[name])}
    return rewriter.call(node.target, *(value for value, _ in pairs), **kwargs)  # type: ignore[arg-type]


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node) or isinstance(default, fx.Node):
        return False
    if isinstance(value, (list, tuple)):  # a default may be one number for all dimensions
        every = default if isinstance(default, (list, tuple)) else [default] * len(value)
        return list(value) == list(every)
    return type(value) is type(default) and bool(value == default)


def bias_of_both(first: Layer, second: Layer, matrix: torch.Tensor) -> torch.Tensor | None:
    """The bias (out,) of two layers in one, in float64; the second multiplies by ``matrix`` (out, in)."""
    inner, own = first.wide_bias(), second.wide_bias()
    if inner is None:
        return own
    return matrix @ inner if own is None else own + matrix @ inner


def refuse_range(
    wide: torch.Tensor, was: torch.Tensor, dtype: torch.dtype, summed: tuple[int, ...] = ()
) -> str | None:
    """Why a weight computed in float64 does not fit its type, or None.

    A number below the smallest normal one, tiny, is off by up to u * tiny when it is rounded (u is half a
    unit in the last place), any other by u times itself. So the few small weights that every layer has cost
    nothing, and a row of nothing else has lost its digits. A row is refused where the 2-norm of what its
    small weights may add exceeds u times the row's own: where rounding would cost more than sqrt(2) times
    what it always does. Both are taken at the scale that the weights had, since a column that shrinks meets
    an input that is as much larger.

    Args:
        wide: the new weight.
        was: the old one, of the same shape; what was too small to be a normal number before may stay so.
        dtype: of both.
        summed: the dimensions along which products with the weight are added: those of a row.
    """
    info = torch.finfo(dtype)
    if not torch.isfinite(wide).all() or bool((wide.abs() > info.max).any()):
        return f"the new weights would overflow {dtype}"
    small = (wide != 0) & (wide.abs() < info.tiny) & (was.abs() >= info.tiny)
    if not small.any():
        return None
    added = torch.where(small, info.tiny * was / wide, 0.0).square().sum(summed)
    lost = bool((added > was.square().sum(summed)).any())
    return f"the new weights would underflow {dtype}" if lost else None


def also_read(node: fx.Node, by: fx.Node) -> str | None:
    """The remark about a second reader of a value that the rewrite would not compute any more."""
    other = next((user for user in node.users if user is not by), None)
    return None if other is None else f"{node.name} is also read by {other.name}"
