"""layer_norm(x + r, w, b) -> add_layer_norm(x, r, w, b), which also returns x + r."""

from __future__ import annotations

import operator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import ANY, Call, Match, Var
from graphopt.kernels.add_layer_norm import OP as ADD_LAYER_NORM
from graphopt.passes._residual import refuse_residual
from graphopt.passes._scalars import number, tensor

aten = torch.ops.aten

pattern = Call(
    aten.layer_norm.default,
    Call(aten.add.Tensor, tensor("x"), tensor("r"), name="sum"),
    Var("shape"),
    Var("w"),
    Var("b"),
    number("eps"),
    cudnn_enable=ANY,
)


def check(match: Match) -> str | None:
    """One normalised dimension; summands of one shape and type."""
    if len(match["shape"]) != 1:
        return f"{len(match['shape'])} dimensions are normalised together"
    return refuse_residual(match)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; whoever read the sum reads the op's second output."""
    args = (match["x"], match["r"], match["w"], match["b"], float(match["eps"]))
    both = rewriter.call(ADD_LAYER_NORM.overload, *args)
    rewriter.replace(match.root, rewriter.call(operator.getitem, both, 0))
    rewriter.replace(match["sum"], rewriter.call(operator.getitem, both, 1))


PASS = register(Pass("fuse_add_layer_norm", "fuse", pattern, rewrite, check))
