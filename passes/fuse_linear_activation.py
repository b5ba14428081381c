"""act(linear(x, w, b)) [+ r] -> linear_activation(x, w, b, act, r)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.linear_activation import OP as LINEAR_ACTIVATION
from graphopt.passes._epilogue import activations, named, only_reader, summands

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every activation of a projection, with the residual that is added to it alone."""
    for act in activations(graph):
        linear = act.args[0]
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
            continue
        total = only_reader(act)
        pair = summands(total)
        residual = pair[pair[0] is act] if pair is not None else None
        if total is not None and residual not in (None, linear):
            bound = {"linear": linear, "act": act, "residual": residual}
            yield Match(graph, total, (linear, act, total), bound)
        else:
            yield Match(graph, act, (linear, act), {"linear": linear, "act": act, "residual": None})


def check(match: Match) -> str | None:
    """The weight is a matrix, and nothing else reads the projection."""
    weight = argument(match["linear"], "weight").meta["val"]
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} dimensions, not 2"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One pass over the product instead of one a step."""
    operands = (argument(match["linear"], name) for name in ("input", "weight", "bias"))
    activation = named(match["act"])
    assert activation is not None
    fused = rewriter.call(LINEAR_ACTIVATION.overload, *operands, *activation, match["residual"])
    rewriter.replace(match.root, fused)


PASS = register(Pass("fuse_linear_activation", "fuse", pattern, rewrite, check))
