"""Multiplications and additions of constants, and how they move past what only moves elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import argument
from graphopt.passes._permutations import PERMUTATIONS, permutation

aten = torch.ops.aten

_ADDITIONS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_RESHAPES = (
    *(aten.reshape.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
)
MOVES = frozenset((*_RESHAPES, *PERMUTATIONS))


@dataclass(frozen=True)
class Affine:
    """``source * scale + shift``, shapes and types unchanged.

    Args:
        source: the value.
        scale: float64, of the value's rank; a dimension along which it is the same has size 1.
        shift: likewise; None for 0.
        constants: the nodes that the two are made from.
    """

    source: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor | None
    constants: tuple[fx.Node, ...]


def as_affine(graph: Graph, node: fx.Node) -> Affine | str | None:
    """What a node does to its one input that varies; a reason if that is almost so, None if it is not."""
    if node.target is aten.batch_norm.default:
        return _batch_norm(graph, node)
    if node.target is aten.neg.default:
        return _affine(node, node.args[0], -1.0, None)
    if node.target not in _ELEMENTWISE:
        return None
    left, right = node.args[:2]
    first, second = _number(graph, left), _number(graph, right)
    alpha = argument(node, "alpha") if node.target in (*_ADDITIONS, *_REVERSED) else 1
    if node.target in _QUOTIENTS:
        return None if second is None else _affine(node, left, 1 / second, None, right)
    if node.target is aten.mul.Tensor:
        return _either(node, (left, second, 1.0), (right, first, 1.0), scale=True)
    if node.target in _REVERSED:
        left, right, first, second = right, left, second, first  # b - alpha * a
    sign = -alpha if node.target is not aten.add.Tensor else alpha
    by = None if second is None else sign * second
    return _either(node, (left, by, 1.0), (right, first, sign), scale=False)


_REVERSED = (aten.rsub.Scalar, aten.rsub.Tensor)
_QUOTIENTS = (aten.div.Tensor, aten.true_divide.Tensor)
_ELEMENTWISE = frozenset((aten.mul.Tensor, *_ADDITIONS, *_REVERSED, *_QUOTIENTS))


def _either(node: fx.Node, *sides: tuple[Any, torch.Tensor | None, float], scale: bool) -> Affine | None:
    """The side that varies, its factor, and what the other side, a constant, does to it."""
    for index, (source, constant, factor) in enumerate(sides):
        if constant is not None:
            other = sides[1 - index][0]
            if scale:
                return _affine(node, source, constant, None, other)
            return _affine(node, source, factor, constant, other)
    return None


def _number(graph: Graph, value: Any) -> torch.Tensor | None:
    """A literal or a constant in float64; the repetitions of an expanded one are left out."""
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64)
    while isinstance(value, fx.Node) and value.target is aten.expand.default:
        value = value.args[0]
    found = graph.constant(value)
    return None if found is None or found.is_complex() else found.double()


def _affine(node: fx.Node, source: Any, scale: Any, shift: Any, constant: Any = None) -> Affine | None:
    val = node.meta["val"]
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(before, torch.Tensor) or not val.dtype.is_floating_point:
        return None
    if before.dtype != val.dtype or not same_shape(before.shape, val.shape) or source.op == "get_attr":
        return None
    while isinstance(constant, fx.Node) and constant.op == "call_function":
        constant = constant.args[0]
    made_from = (constant,) if isinstance(constant, fx.Node) else ()
    return Affine(source, _of_rank(scale, val), _of_rank(shift, val), made_from)


def _of_rank(value: Any, like: torch.Tensor) -> Any:
    """A number or tensor with dimensions of size 1 put in front, on the device of what it belongs to."""
    if value is None:
        return None
    wide = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    return wide.reshape((1,) * (like.dim() - wide.dim()) + tuple(wide.shape))


def _batch_norm(graph: Graph, node: fx.Node) -> Affine | str | None:
    """Inference batch norm: (x - mean) / sqrt(var + eps) * gamma + beta, a channel each."""
    if argument(node, "training") or argument(node, "running_mean") is None:
        return None
    names = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}
    given = {short: argument(node, name) for name, short in names.items()}
    for short, value in given.items():
        if value is not None and graph.constant(value) is None:
            return f"{short} is not a constant"
    wide = {short: None if v is None else _number(graph, v) for short, v in given.items()}
    gamma, beta, mean, var = (wide[short] for short in names.values())
    assert mean is not None and var is not None
    scale = torch.rsqrt(var + argument(node, "eps"))
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale
    shift = shift if beta is None else shift + beta
    rank = node.meta["val"].dim()
    scale, shift = (value.reshape(1, -1, *[1] * (rank - 2)) for value in (scale, shift))
    source: Any = argument(node, "input")
    return Affine(source, scale, shift, tuple(value for value in given.values() if value is not None))


STEPS = (*sorted(_ELEMENTWISE, key=str), aten.neg.default)


# Moving constants along with the elements


def moved(value: torch.Tensor, node: fx.Node, *, back: bool = False) -> torch.Tensor | None:
    """A constant that broadcasts to the input of a move, as it broadcasts to the result; None if it does not.

    Args:
        value: of the input's rank, a dimension along which it is the same has size 1.
        node: one of MOVES.
        back: from the result to the input.
    """
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]
    order = permutation(node)
    if order is not None:
        if back:
            order = sorted(range(len(order)), key=order.__getitem__)
        return value.permute(order)
    return _reshaped(value, *((after.shape, before.shape) if back else (before.shape, after.shape)))


def _reshaped(value: torch.Tensor, before: Any, after: Any) -> torch.Tensor | None:
    """Equal sizes at both ends keep their dimensions; what lies between is one block of fixed size."""
    front = 0
    while front < min(len(before), len(after)) and same_size(before[front], after[front]):
        front += 1
    back = 0
    while back < min(len(before), len(after)) - front and same_size(before[-1 - back], after[-1 - back]):
        back += 1
    last = len(before) - back
    inner, sizes = value.shape[front:last], [*before[front:last], *after[front : len(after) - back]]
    ends = [value.shape[:front], value.shape[last:]]
    if all(size == 1 for size in inner):
        return value.reshape(*ends[0], *[1] * (len(after) - back - front), *ends[1])
    if not all(isinstance(size, int) for size in sizes):
        return None
    whole = value.expand(*ends[0], *before[front:last], *ends[1])
    return whole.reshape(*ends[0], *after[front : len(after) - back], *ends[1])


def by_channel(value: torch.Tensor, dim: int, channels: int) -> torch.Tensor | str:
    """A constant as one number a channel; a reason if it differs along another dimension."""
    for other, size in enumerate(value.shape):
        if other != dim and size != 1:
            return f"the constant differs along dimension {other}, not only by channel"
    return value.reshape(-1).expand(channels)
