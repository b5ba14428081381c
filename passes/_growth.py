"""How much larger than what it is made from a constant may be: the one limit."""

from __future__ import annotations

from graphopt.ir.graph import tensor_bytes

_MAX_GROWTH = 16 * 2**20  # bytes


def refuse_growth(constant: float, made_from: float) -> str | None:
    """Why a constant of so many bytes is not made, or None."""
    growth = constant - made_from
    if growth <= _MAX_GROWTH:
        return None
    return f"the constant would be {growth / 2**20:.0f} MiB larger than what it is made from"


def bytes_of(*values: object) -> float:
    """Bytes of fake or real tensors together."""
    return sum(tensor_bytes(value) for value in values)
