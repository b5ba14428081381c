"""reshape(linear(reshape(x, (-1, K)), w, b), (..., N)) -> linear(x, w, b): a projection takes any rank."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_shape
from graphopt.ir.pattern import ANY, Call, Match, Var, shared_inside
from graphopt.passes._scalars import tensor

aten = torch.ops.aten

pattern = Call(
    aten.reshape.default,
    Call(
        aten.linear.default,
        Call(aten.reshape.default, tensor("x"), ANY, name="flat"),
        tensor("w"),
        Var("b"),
        name="linear",
    ),
    ANY,
)


def check(match: Match) -> str | None:
    """The rows must come back as they were; as many rows have as many features."""
    x, result = match.val("x"), match.root.meta["val"]
    if not same_shape((*x.shape[:-1], match.val("w").shape[0]), result.shape):
        return f"rows of shape {list(x.shape[:-1])} come back as {list(result.shape[:-1])}"
    shared = shared_inside(match, [match["flat"]])
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Project where the value lies."""
    rewriter.replace(match.root, rewriter.call(aten.linear.default, match["x"], match["w"], match["b"]))


PASS = register(Pass("fold_linear_reshape", "fold", pattern, rewrite, check))
