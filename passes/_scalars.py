"""Leaves for patterns: literals and the values that they may have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt.ir.pattern import Var

_RELATIVE = 1e-6  # spelled-out constants are rounded in their sources: 0.7978845608


def close_to(number: float) -> Var:
    """A literal of about that value."""

    def near(value: Any) -> bool:
        number_like = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number_like and math.isclose(value, number, rel_tol=_RELATIVE)

    return Var("", near, f"the literal {number:.6g}")


def number(name: str) -> Var:
    """Any literal number, bound under a name."""
    return Var(name, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "a literal number")


def tensor(name: str, rank: int | None = None) -> Var:
    """A tensor, of a given rank if one is given, bound under a name."""

    def fits(value: Any) -> bool:
        val = value.meta.get("val") if isinstance(value, fx.Node) else None
        return isinstance(val, torch.Tensor) and (rank is None or val.dim() == rank)

    return Var(name, fits, "a tensor" if rank is None else f"a tensor of rank {rank}")
