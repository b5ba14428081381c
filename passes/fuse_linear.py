"""addmm(b, x, w) or matmul(x, w) + b -> linear(x, w^T, b), for a constant w: one spelling of a projection."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_size
from graphopt.ir.pattern import Call, Match, Or, shared_inside
from graphopt.passes._scalars import tensor

aten = torch.ops.aten

_product = Call((aten.matmul.default, aten.mm.default), tensor("x"), tensor("w", rank=2))

pattern = Or(
    Call(aten.addmm.default, tensor("b"), tensor("x"), tensor("w")),
    Call(aten.add.Tensor, _product, tensor("b"), commutative=True),
)


def check(match: Match) -> str | None:
    """The weight must be a constant (its transpose is a view, no copy), the bias one value a column."""
    if match.constant("w") is None:
        return "the weight is not a constant"
    bias, columns = match.val("b"), match.val("w").shape[1]
    if bias.dim() != 1 or not same_size(bias.shape[0], columns):
        return f"the bias has shape {list(bias.shape)}, not one value for each of {columns} columns"
    if bias.dtype != match.val("x").dtype:
        return f"the bias is {bias.dtype}, not {match.val('x').dtype}"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Keep the weight's memory, and read it transposed."""
    weight = match.constant("w")
    assert weight is not None
    transposed = rewriter.constant(weight.t(), [match["w"]], "transposed")
    rewriter.replace(match.root, rewriter.call(aten.linear.default, match["x"], transposed, match["b"]))


PASS = register(Pass("fuse_linear", "fuse", pattern, rewrite, check))
