"""Calibration: ranges of values inside a graph, observed on the user's inputs, for steps that stay fixed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.evaluate import evaluate
from graphopt.ir.graph import Graph

_KEY = "graphopt_ranges"
Place = tuple[fx.Node, int]  # a value, and the dimension along which its channels are counted


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of each channel, 0 among them: a code for 0 there must be.

    Args:
        low: (channels,), 0 or below.
        high: (channels,), 0 or above.
    """

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, value: torch.Tensor, dim: int) -> Range:
        """The range of a tensor's channels, which are counted along a dimension."""
        rows = value.detach().movedim(dim, -1).reshape(-1, value.shape[dim])
        low, high = torch.aminmax(rows, dim=0)
        return cls(low.clamp_max(0), high.clamp_min(0))

    def joined(self, other: Range) -> Range:
        """The range of both."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def fixed(self) -> tuple[float, int]:
        """The step between 256 codes and the code of 0, one of each for all channels.

        Smallest and largest values are ends of the scale: nothing that was observed is cut off.
        """
        low, high = float(self.low.min()), float(self.high.max())
        step = (high - low) / 255
        return step, round(-low / step)

    @property
    def is_sound(self) -> bool:
        """Whether there are steps for it: it is finite, and more than the point 0."""
        finite = bool(self.low.isfinite().all() and self.high.isfinite().all())
        return finite and float(self.high.max()) - float(self.low.min()) > _LEAST


_LEAST = 1e-30  # below, a step underflows


def observe(
    graph: Graph, places: Collection[Place], calls: Iterable[Sequence[torch.Tensor]]
) -> dict[Place, Range]:
    """Run a graph, and return the ranges of some of its values.

    Args:
        graph: the graph.
        places: what to observe.
        calls: flat tensor inputs, a call each.
    """
    found: dict[Place, Range] = {}
    dims = defaultdict[fx.Node, list[int]](list)
    for node, dim in places:
        dims[node].append(dim)

    def see(node: fx.Node, value: Any) -> None:
        for dim in dims.get(node, ()) if isinstance(value, torch.Tensor) and value.numel() else ():
            seen, place = Range.of(value, dim), (node, dim)
            found[place] = found[place].joined(seen) if place in found else seen

    ends: Any = graph.output.args[0]
    wanted = [end for end in ends if isinstance(end, fx.Node)]
    for inputs in calls:
        given = dict(zip(graph.placeholders, inputs, strict=True))
        for node, value in given.items():
            see(node, value)
        evaluate(graph, wanted, given, see=see)
    return found


def keep(node: fx.Node, **ranges: Range | None) -> None:
    """Write down at a node the ranges of what it reads and gives, by name.

    They stay with the node when the graph is copied, and when what it reads is replaced.
    """
    node.meta[_KEY] = {name: found for name, found in ranges.items() if found is not None}


def observed(node: fx.Node, name: str) -> Range | None:
    """A range that was written down at a node, or None."""
    found: Range | None = node.meta.get(_KEY, {}).get(name)
    return found
