"""rms_norm(x + r, w) -> add_rms_norm(x, r, w), which also returns x + r."""

from __future__ import annotations

import operator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Call, Match, Var
from graphopt.kernels.add_rms_norm import OP as ADD_RMS_NORM
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.passes._residual import refuse_residual
from graphopt.passes._scalars import number, tensor

pattern = Call(
    RMS_NORM.overload,
    Call(torch.ops.aten.add.Tensor, tensor("x"), tensor("r"), name="sum"),
    Var("w"),
    number("eps"),
)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; whoever read the sum reads the op's second output."""
    both = rewriter.call(ADD_RMS_NORM.overload, match["x"], match["r"], match["w"], match["eps"])
    rewriter.replace(match.root, rewriter.call(operator.getitem, both, 0))
    rewriter.replace(match["sum"], rewriter.call(operator.getitem, both, 1))


PASS = register(Pass("fuse_add_rms_norm", "fuse", pattern, rewrite, refuse_residual))
