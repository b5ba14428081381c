"""gelu(linear(x, w, b)) -> bias_gelu(linear(x, w), b)."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Call, Match, Var, shared_inside
from graphopt.kernels.bias_gelu import OP as BIAS_GELU
from graphopt.passes._scalars import tensor

aten = torch.ops.aten

pattern = Call(
    aten.gelu.default,
    Call(aten.linear.default, tensor("x"), tensor("w"), tensor("b", rank=1)),
    approximate=Var("approximate"),
)


def check(match: Match) -> str | None:
    """Nothing else may read the projection."""
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The product without its bias, then bias and activation in one pass over memory."""
    product = rewriter.call(aten.linear.default, match["x"], match["w"])
    rewriter.replace(match.root, rewriter.call(BIAS_GELU.overload, product, match["b"], match["approximate"]))


PASS = register(Pass("fuse_bias_gelu", "fuse", pattern, rewrite, check))
