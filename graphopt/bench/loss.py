"""What sides lose where a case allows a loss: held against float64, all by one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.compiler.compare import Comparison, worst_error
from graphopt.compiler.lossy import relative_distance


@dataclass(frozen=True)
class Lost(Comparison):
    """A verdict under a budget.

    Args:
        loss: relative distance from float64, in the 2-norm, of the worst output.
        cosine: cosine similarity to float64 of the output that is least similar.
    """

    loss: float = 0.0
    cosine: float = 1.0


def lost(found: Sequence[Any], float64: Sequence[Any], max_loss: float) -> Lost:
    """Judge what a side computes by what it loses.

    Args:
        found: its outputs.
        float64: the same of the model in float64.
        max_loss: the most that may be lost; infinite and undefined outputs are never within it.
    """
    error, loss = worst_error(found, float64), relative_distance(float64, found)
    pairs = zip(float64, found, strict=True)
    cosine = min((_cosine(*pair) for pair in pairs if _is_floating(pair[0])), default=1.0)
    reason = "" if loss <= max_loss else f"the loss is {loss:.3g}, above the {max_loss:.3g} allowed"
    return Lost(0.0, error, not reason, reason, loss, cosine)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cosine(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Of two tensors as vectors; two zeros are alike."""
    left, right = wanted.double().flatten(), found.double().flatten()
    sizes = float(left.norm() * right.norm())
    return float(left @ right) / sizes if sizes else float(torch.equal(left, right))
