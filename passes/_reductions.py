"""Calls that take the last dimensions of a tensor together, as steps of a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import same_shape, same_size
from graphopt.ir.pattern import arguments
from graphopt.kernels._program import OVER_ONE
from graphopt.passes._steps import DTYPES, is_tensor

aten = torch.ops.aten

_NAMES: dict[Any, str] = {
    aten.sum.dim_IntList: "sum",
    aten.mean.dim: "mean",
    aten.amax.default: "amax",
    aten.amin.default: "amin",
    aten.prod.dim_int: "prod",
    aten.linalg_vector_norm.default: "norm",
    aten.softmax.int: "softmax",
    aten.log_softmax.int: "log_softmax",
}


@dataclass(frozen=True)
class Rows:
    """What a reduction reads, as rows.

    Args:
        whole: the shape of what it reads.
        dims: how many of the last dimensions make a row.
    """

    whole: tuple[Any, ...]
    dims: int

    def form(self, shape: Sequence[Any]) -> str | None:
        """What values of a shape are; None for any other shape.

        Args:
            shape: of the values.

        Returns:
            "whole" rows; or one value a row, "kept" in dimensions of size 1 or with these "dropped".
        """
        lead = self.whole[: len(self.whole) - self.dims]
        forms = {"whole": self.whole, "kept": (*lead, *(1,) * self.dims), "dropped": lead}
        return next((form for form, wanted in forms.items() if same_shape(tuple(shape), wanted)), None)


def is_reduction(node: fx.Node) -> bool:
    """True for a call that a program may have a name for, over whatever dimensions."""
    return node.target in _NAMES


def name_of(node: fx.Node) -> str:
    """A reduction's name in a program."""
    return _NAMES[node.target]


def rows_of(node: fx.Node) -> Rows | str:
    """What a reduction takes together, or why it is no step of a program."""
    name, given = _NAMES[node.target], {key: value for key, (value, _) in arguments(node).items()}
    source: Any = given.get("self", given.get("x"))
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return f"{name} reads no tensor"
    val = source.meta["val"]
    if val.dtype not in DTYPES or node.meta["val"].dtype != val.dtype:
        return f"{name} makes {node.meta['val'].dtype} of {val.dtype}"
    if name == "norm" and given["ord"] != 2:
        return f"the norm is of order {given['ord']}"
    axes = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    rank = val.dim()
    axes = sorted(axis % rank for axis in axes if axis is not None) if rank else []
    if not axes or axes != list(range(rank - len(axes), rank)):
        return f"{name} is not over the last dimensions"
    if name in OVER_ONE and len(axes) > 1:
        return f"{name} is over {len(axes)} dimensions"
    if all(same_size(val.shape[axis], 1) for axis in axes):
        return f"{name} is over one element"
    return Rows(tuple(val.shape), len(axes))
