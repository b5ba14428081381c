"""addmm(b, x, w) -> linear(x, w^T, b), for a constant w: one spelling of a projection."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Call, Match, Var

aten = torch.ops.aten

pattern = Call(aten.addmm.default, Var("b"), Var("x"), Var("w"))


def check(match: Match) -> str | None:
    """The weight must be a constant (its transpose is a view, no copy), the bias one value a column."""
    if match.constant("w") is None:
        return "the weight is not a constant"
    if match.val("b").dim() != 1:
        return "the bias is not a vector"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Keep the weight's memory, and read it transposed."""
    weight = match.constant("w")
    assert weight is not None
    transposed = rewriter.constant(weight.t(), [match["w"]], "transposed")
    rewriter.replace(match.root, rewriter.call(aten.linear.default, match["x"], transposed, match["b"]))


PASS = register(Pass("fuse_linear", "fuse", pattern, rewrite, check))
