"""linear(x, w, b) -> linear(x, w', b), where of each 4 neighbours in a row the 2 smallest are zero.

The pattern that sparse matrix units of GPUs run at twice the rate. Not exact. Shapes stay.
Source: Mishra et al., Accelerating Sparse Deep Neural Networks (arXiv:2104.08378).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every linear layer that is not sparse so yet, in ascending order of what goes of its weight."""
    found = []
    for node in graph.calls:
        if node._erased or node.target is not aten.linear.default:
            continue
        weight = graph.constant(argument(node, "weight"))
        if weight is not None and weight.is_floating_point() and weight.dim() == 2 and not _is_sparse(weight):
            found.append((_damage(weight), node))
    for damage, node in sorted(found, key=lambda one: one[0]):
        yield Match(graph, node, (node,), {"w": argument(node, "weight"), "damage": damage})


def check(match: Match) -> str | None:
    """Rows must divide into fours."""
    columns = match.val("w").shape[1]
    return f"rows of {columns} do not divide into fours" if columns % 4 else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The same layer with the other half of its weights."""
    x, _, *bias = match.root.args
    weight = match.constant("w")
    assert weight is not None
    sparse = rewriter.constant(two_of_four(weight), [match["w"]], "2 of 4")
    rewriter.replace(match.root, rewriter.call(aten.linear.default, x, sparse, *bias))


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The weight with the 2 smallest of each 4 neighbours in a row set to zero.

    Args:
        weight: (rows, columns), where 4 divides the columns.
    """
    fours = weight.reshape(weight.shape[0], -1, 4)
    smallest = fours.abs().argsort(dim=-1)[..., :2]
    return fours.scatter(-1, smallest, 0).reshape(weight.shape)


def _is_sparse(weight: torch.Tensor) -> bool:
    return weight.shape[1] % 4 == 0 and torch.equal(two_of_four(weight), weight)


def _damage(weight: torch.Tensor) -> float:
    """The part of the weight, in squared norm, that goes; 1 where its rows do not divide."""
    if weight.shape[1] % 4:
        return 1.0
    total = weight.double().square().sum().clamp_min(1e-300)
    return 1.0 - float(two_of_four(weight).double().square().sum() / total)


PASS = register(Pass("prune_two_of_four", "prune", pattern, rewrite, check, exact=False))
