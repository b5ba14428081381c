"""What the two residual norms refuse alike."""

from __future__ import annotations

from graphopt.ir.graph import same_shape
from graphopt.ir.pattern import Match


def refuse_residual(match: Match) -> str | None:
    """Why the addition bound as ``sum`` of ``x`` and ``r`` is no residual, or None."""
    x, residual = match.val("x"), match.val("r")
    if not same_shape(x.shape, residual.shape):
        return f"the summands differ in shape: {list(x.shape)} and {list(residual.shape)}"
    if x.dtype != residual.dtype:
        return f"the summands differ in type: {x.dtype} and {residual.dtype}"
    return None
