"""What ops that only move values do to a tensor of places, within the trailing dimensions that are followed.

``Features`` applies them to the indices, signs and table columns of features; nothing here knows of those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.ir.pattern import argument

aten = torch.ops.aten

Place = Callable[[Any], Any]  # a dimension of the op among the trailing ones; None for one that leads
Move = Callable[[torch.Tensor, fx.Node, Place], Any]  # a tensor, or a tuple of them, or None: it does more


def _slice(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    dim = place(argument(node, "dim"))
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    fixed = all(number is None or isinstance(number, int) for number in (start, end))
    return t[(slice(None),) * dim + (slice(start, end, step),)] if dim is not None and fixed else None


def _select(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    dim, index = place(argument(node, "dim")), argument(node, "index")
    return t.select(dim, index) if dim is not None and isinstance(index, int) else None


def _split(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    dim = place(argument(node, "dim"))
    return None if dim is None else torch.split(t, node.args[1], dim)  # type: ignore[arg-type]


def _unbind(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    dim = place(argument(node, "dim"))
    return None if dim is None else torch.unbind(t, dim)


def _transpose(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    first, second = place(node.args[1]), place(node.args[2])
    return t.transpose(first, second) if first is not None and second is not None else None


def _roll(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    by, dims = argument(node, "shifts"), [place(dim) for dim in argument(node, "dims")]
    return t.roll(by, dims) if dims and None not in dims else None


def _flip(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    dims = [place(dim) for dim in argument(node, "dims")]
    return None if None in dims else t.flip(dims)


def _unsqueeze(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    dim = place(argument(node, "dim"))
    return None if dim is None else t.unsqueeze(dim)


def _squeeze(t: torch.Tensor, node: fx.Node, place: Place) -> Any:
    dim = place(argument(node, "dim"))
    return t.squeeze(dim) if dim is not None and t.shape[dim] == 1 else None


MOVES: dict[Any, Move] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.transpose.int: _transpose,
    aten.roll.default: _roll,
    aten.flip.default: _flip,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
}
