"""What a graph, or a part of it, is held against: itself in its own precision, and in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.compiler.compare import Comparison, compare
from graphopt.compiler.evaluate import evaluate
from graphopt.ir.graph import Graph

_SEED, _RUNS = 19970501, 4


class Reference:
    """The values of nodes as the original computes them, to hold a candidate against.

    A candidate may err as much as the original does. Where a sum cancels, or a score of large magnitude is
    exponentiated, one run of the original can be right by luck: rounding then decides the result, and any
    other order of additions differs by as much. So a candidate that errs more is held against the original
    run again a few times with every value rounded at random, and passes if it errs no more than those.

    Args:
        graph: the original.
        wanted: the nodes.
        given: what they are computed from.
        floor_ulps: the floor of the tolerance, in units in the last place.

    Raises:
        RuntimeError: the original does not take what is given.
    """

    def __init__(
        self, graph: Graph, wanted: Sequence[fx.Node], given: dict[fx.Node, Any], floor_ulps: float
    ) -> None:
        self._problem = graph, list(wanted), given
        self._floor = floor_ulps
        self.before = evaluate(graph, wanted, given)
        self.float64 = evaluate(graph, wanted, given, float64=True)
        self._noisy: list[list[Any]] | None = None

    def compare(self, after: Sequence[Any]) -> Comparison:
        """Judge the values of a candidate."""
        found = compare(self.before, after, self.float64, self._floor)
        if found.ok:
            return found
        for noisy in self._rounded_at_random():
            against = compare(noisy, after, self.float64, self._floor)
            if against.ok and _agree(self.before, noisy):
                return dataclasses.replace(
                    against, error_before=max(found.error_before, against.error_before)
                )
        return found

    def _rounded_at_random(self) -> list[list[Any]]:
        if self._noisy is None:
            graph, wanted, given = self._problem
            generator = torch.Generator().manual_seed(_SEED)
            self._noisy = [evaluate(graph, wanted, given, noise=generator) for _ in range(_RUNS)]
        return self._noisy


def output_reference(graph: Graph, inputs: Sequence[torch.Tensor], floor_ulps: float) -> Reference:
    """The reference for all that a graph returns and computes; ``computed`` picks the same of results."""
    given = dict(zip(graph.placeholders, inputs, strict=True))
    results: Any = graph.output.args[0]
    return Reference(graph, [node for node in results if isinstance(node, fx.Node)], given, floor_ulps)


def computed(graph: Graph, results: Sequence[Any]) -> list[Any]:
    """Those of a graph's results that it computes: literals are left out."""
    ends: Any = graph.output.args[0]
    return [value for end, value in zip(ends, results, strict=True) if isinstance(end, fx.Node)]


def _agree(before: Sequence[Any], noisy: Sequence[Any]) -> bool:
    """True when random rounding changed no integer and made nothing infinite or undefined."""
    for left, right in zip(before, noisy, strict=True):
        if isinstance(left, torch.Tensor):
            left, right = (v.isfinite() if v.is_floating_point() else v for v in (left, right))
            if not torch.equal(left, right):
                return False
    return True
