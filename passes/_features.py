"""Which features of a tensor, with which sign and times which table, a value is made of.

A rotary embedding takes features apart and puts them together again (slices, halves, pairs, complex numbers),
and multiplies by tables of cosines and sines in between. ``Features`` follows every feature on its way, so
that what comes out can be compared with what a rotation is, however it is spelled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import argument
from graphopt.passes._moves import MOVES, Move

aten = torch.ops.aten

Table = tuple[fx.Node, str]  # a table, and which part of it where it is complex: "real" or "imag"


@dataclass(frozen=True)
class Part:
    """For every place in the layout: sign * x[..., index] * table[..., at], all of the layout's shape."""

    sign: torch.Tensor
    index: torch.Tensor
    at: torch.Tensor

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Part:
        """The part with its places moved."""
        return Part(change(self.sign), change(self.index), change(self.at))


@dataclass(frozen=True)
class Features:
    """A value as the sum of its parts; the key None stands for features that no table multiplies."""

    parts: dict[Table | None, Part]

    @property
    def layout(self) -> torch.Size:
        """The shape of the trailing dimensions that hold the features."""
        return next(iter(self.parts.values())).sign.shape

    @property
    def is_moved_only(self) -> bool:
        """Some of the features, as they are."""
        return list(self.parts) == [None] and bool((self.parts[None].sign == 1).all())

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Features:
        """The features with their places moved."""
        return Features({key: part.each(change) for key, part in self.parts.items()})


@dataclass(frozen=True)
class Complex:
    """A complex value by its real and imaginary parts."""

    real: Features
    imag: Features


class Followed:
    """The values that are made of the last dimension of one tensor, computed when asked for.

    Args:
        graph: the graph.
        x: the tensor, (..., D) with D fixed.
    """

    def __init__(self, graph: Graph, x: fx.Node) -> None:
        self.graph = graph
        self.x = x
        self.leading = x.meta["val"].dim() - 1
        every = torch.arange(x.meta["val"].shape[-1])
        whole = Part(torch.ones_like(every), every, torch.zeros_like(every))
        self.found: dict[fx.Node, Any] = {x: Features({None: whole})}

    def __call__(self, node: Any) -> Any:
        """The features of a node: Features, Complex, a tuple of them for a split, or None."""
        if not isinstance(node, fx.Node) or node < self.x:
            return None
        if node not in self.found:
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            self.found[node] = None if rule is None else rule(self, node)
        return self.found[node]

    def dim(self, node: fx.Node, dim: int, rank: int) -> int | None:
        """A dimension among those of the layout; None for one that leads."""
        place = dim % rank - self.leading
        return place if place >= 0 else None


def feature_source(node: fx.Node) -> fx.Node | None:
    """The value that a node takes features from, by itself or with others; None where there is none."""
    if node.op != "call_function" or node.target not in _RULES:
        return None
    if node.target in _SUMS:
        factors = [factor for factor in node.all_input_nodes if factor.op != "get_attr"]
        signed = node.target is aten.mul.Tensor and len(factors) == 1 < len(node.all_input_nodes)
        return factors[0] if signed else None
    source: Any = node.args[0]
    if isinstance(source, (list, tuple)):
        source = source[0]
    return source if isinstance(source, fx.Node) else None


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _moved(change: Move) -> Any:
    """The rule of an op that moves features: ``change`` does to indices what the op does to features."""

    def rule(followed: Followed, node: fx.Node) -> Any:
        source: Any = node.args[0]
        features = followed(source)
        if not isinstance(features, Features):
            return None
        rank = _rank(source) + (node.target is aten.unsqueeze.default)
        dims = lambda dim: followed.dim(node, dim, rank)  # noqa: E731
        if any(change(part.sign, node, dims) is None for part in features.parts.values()):
            return None
        changed = {key: part.each(lambda t: change(t, node, dims)) for key, part in features.parts.items()}
        if not isinstance(next(iter(changed.values())).sign, tuple):
            return Features(changed)
        pieces = len(next(iter(changed.values())).sign)
        return tuple(
            Features({key: part.each(operator.itemgetter(i)) for key, part in changed.items()})
            for i in range(pieces)
        )

    return rule


def _reshape(followed: Followed, node: fx.Node) -> Any:
    """The leading dimensions stay; those of the features are fixed."""
    features, shape = followed(node.args[0]), node.meta["val"].shape
    inner = shape[followed.leading :]
    leading = followed.x.meta["val"].shape[:-1]
    if not isinstance(features, Features) or not same_shape(shape[: followed.leading], leading):
        return None
    if not all(isinstance(size, int) for size in inner):
        return None
    return features.each(lambda t: t.reshape(tuple(inner)))


def _same(followed: Followed, node: fx.Node) -> Any:
    return followed(node.args[0])


def _item(followed: Followed, node: fx.Node) -> Any:
    pieces = followed(node.args[0])
    return pieces[node.args[1]] if isinstance(pieces, tuple) else None  # type: ignore[index]


def negated(features: Features) -> Features:
    """The features with the other sign."""
    return Features({key: Part(-part.sign, part.index, part.at) for key, part in features.parts.items()})


def _negated(followed: Followed, node: fx.Node) -> Any:
    features = followed(node.args[0])
    return negated(features) if isinstance(features, Features) else None


def joined(join: Callable[[Sequence[torch.Tensor]], torch.Tensor], pieces: Sequence[Any]) -> Any:
    """Several features as one; a place that a table does not touch has the sign 0 there."""
    if not pieces or not all(isinstance(piece, Features) for piece in pieces):
        return None
    keys = dict.fromkeys(key for piece in pieces for key in piece.parts)

    def of(piece: Features, key: Table | None) -> Part:
        absent = torch.zeros(piece.layout, dtype=torch.long)
        return piece.parts.get(key, Part(absent, absent, absent))

    parts = {key: [of(piece, key) for piece in pieces] for key in keys}
    return Features(
        {
            key: Part(*(join([getattr(p, name) for p in each]) for name in ("sign", "index", "at")))
            for key, each in parts.items()
        }
    )


def _cat(followed: Followed, node: fx.Node) -> Any:
    dim = followed.dim(node, argument(node, "dim"), _rank(node))
    nodes: Any = node.args[0]
    return None if dim is None else joined(lambda t: torch.cat(list(t), dim), [followed(n) for n in nodes])


def _stack(followed: Followed, node: fx.Node) -> Any:
    dim = followed.dim(node, argument(node, "dim"), _rank(node))
    nodes: Any = node.args[0]
    return None if dim is None else joined(lambda t: torch.stack(list(t), dim), [followed(n) for n in nodes])


def _taken(followed: Followed, node: fx.Node) -> Any:
    """Features in the order of a constant index: x[..., [2, 3, 0, 1]]."""
    features = followed(node.args[0])
    if node.target is aten.index.Tensor:
        *leading, at = argument(node, "indices")
        last = len(leading) == _rank(node) - 1 and not any(leading)
    else:
        at, last = argument(node, "index"), argument(node, "dim") in (-1, _rank(node) - 1)
    order = followed.graph.constant(at) if last else None
    if order is None or order.dtype != torch.long or order.dim() != 1:
        return None
    order = order.cpu()
    fits = isinstance(features, Features) and len(features.layout) == 1
    return features.each(lambda t: t[order]) if fits else None


def _is_column(node: fx.Node) -> bool:
    return node.target is aten.unsqueeze.default and node.args[1] in (-1, _rank(node) - 1)


def _times(features: Features, table: fx.Node, part: str = "") -> Features | None:
    """Features that no table has multiplied yet, times a table that lines up with the layout."""
    layout = features.layout
    while (
        len(layout) > 1 and table.target is aten.unsqueeze.default and table.args[1] in (-1, _rank(table) - 1)
    ):
        table, layout = table.args[0], layout[:-1]  # type: ignore[assignment]
    width = table.meta["val"].shape[-1] if _rank(table) else 1
    if list(features.parts) != [None] or not layout or not isinstance(width, int):
        return None
    if width not in (1, layout[-1]):
        return None
    if len(layout) > 1:  # a table over more than one dimension of features
        return None
    at = torch.arange(width).expand(layout)
    at = at.reshape(*layout, *[1] * (len(features.layout) - 1)).expand(features.layout)
    whole = features.parts[None]
    return Features({(table, part): Part(whole.sign, whole.index, at)})


def _product(followed: Followed, node: fx.Node) -> Any:
    for this, other in (node.args[:2], node.args[1::-1]):
        features = followed(this)
        if features is None or not isinstance(other, fx.Node) or followed(other) is not None:
            continue
        if isinstance(features, Features):
            signs = _signs(followed, features, other)
            if signs is not None:
                return Features({k: Part(p.sign * signs, p.index, p.at) for k, p in features.parts.items()})
            return _times(features, other) if not other.meta["val"].is_complex() else None
        if isinstance(features, Complex) and other.meta["val"].is_complex():
            return _turned(features, other)
    return None


def _signs(followed: Followed, features: Features, factor: fx.Node) -> torch.Tensor | None:
    """A constant of ones and minus ones for each place of the layout; None for any other factor."""
    constant, layout = followed.graph.constant(factor), features.layout
    if constant is None or constant.dtype == torch.bool or constant.is_complex():
        return None
    if not bool((constant.abs() == 1).all()):
        return None
    padded = (1,) * (len(layout) - constant.dim()) + tuple(constant.shape)
    own = padded[len(padded) - len(layout) :]
    fits = all(size == 1 for size in padded[: len(padded) - len(layout)])
    fits = fits and all(size in (1, whole) for size, whole in zip(own, layout, strict=True))
    return constant.long().cpu().reshape(own).expand(layout) if fits else None


def _turned(value: Complex, table: fx.Node) -> Complex | None:
    """(a + ib) (c + id) = (ac - bd) + i (ad + bc)."""
    ac, bd = _times(value.real, table, "real"), _times(value.imag, table, "imag")
    ad, bc = _times(value.real, table, "imag"), _times(value.imag, table, "real")
    if ac is None or bd is None or ad is None or bc is None:
        return None
    real, imag = _added(ac, negated(bd)), _added(ad, bc)
    return None if real is None or imag is None else Complex(real, imag)


def _added(left: Any, right: Any) -> Features | None:
    """A sum; two parts of one table must not meet at one place."""
    if not isinstance(left, Features) or not isinstance(right, Features) or left.layout != right.layout:
        return None
    parts = dict(left.parts)
    for key, part in right.parts.items():
        mine = parts.get(key)
        if mine is not None and bool((mine.sign * part.sign).any()):
            return None
        parts[key] = (
            part
            if mine is None
            else Part(*(a + b for a, b in zip(_masked(mine), _masked(part), strict=True)))
        )
    return Features(parts)


def _masked(part: Part) -> tuple[torch.Tensor, ...]:
    there = part.sign.abs()
    return part.sign, part.index * there, part.at * there


def _sum(followed: Followed, node: fx.Node) -> Any:
    left, right = (followed(value) for value in node.args[:2])
    if node.kwargs or len(node.args) > 2 or not isinstance(right, Features):
        return None
    return _added(left, negated(right) if node.target is aten.sub.Tensor else right)


def _as_complex(followed: Followed, node: fx.Node) -> Any:
    features = followed(node.args[0])
    if not isinstance(features, Features) or features.layout[-1:] != (2,):
        return None
    return Complex(*(features.each(lambda t, i=i: t[..., i]) for i in (0, 1)))  # type: ignore[misc]


def _of_two(followed: Followed, node: fx.Node) -> Any:
    real, imag = (followed(value) for value in node.args[:2])
    fits = isinstance(real, Features) and isinstance(imag, Features) and real.layout == imag.layout
    return Complex(real, imag) if fits else None


def _as_real(followed: Followed, node: fx.Node) -> Any:
    value = followed(node.args[0])
    pair = [value.real, value.imag] if isinstance(value, Complex) else []
    return joined(lambda t: torch.stack(list(t), -1), pair)


_SUMS = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)

_RULES: dict[Any, Callable[[Followed, fx.Node], Any]] = {
    **{target: _moved(change) for target, change in MOVES.items()},
    aten.index.Tensor: _taken,
    aten.index_select.default: _taken,
    aten.reshape.default: _reshape,
    aten.to.dtype: _same,
    aten.type_as.default: _same,
    aten.neg.default: _negated,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.mul.Tensor: _product,
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.view_as_complex.default: _as_complex,
    aten.complex.default: _of_two,
    aten.view_as_real.default: _as_real,
    operator.getitem: _item,
}
