"""x * rsqrt(mean(x^2, -1) + eps) * w -> rms_norm(x, w, eps), the statistics in float32 or in x's own dtype."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_size
from graphopt.ir.pattern import Call, Match, Or, Var, shared_inside
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.passes._scalars import close_to, number, tensor

aten = torch.ops.aten
mul = aten.mul.Tensor

_wide = Or(Call(aten.to.dtype, Var("x"), torch.float32, name="cast"), Var("x"))
_square = Or(Call(aten.pow.Tensor_Scalar, _wide, close_to(2.0)), Call(mul, _wide, _wide))
_mean = Call(aten.mean.dim, _square, [-1], True)
_scale = Call(aten.rsqrt.default, Call(aten.add.Tensor, _mean, number("eps")))
_normed = Call(mul, _wide, _scale, commutative=True)
_narrow = Or(Call(aten.to.dtype, _normed, Var("back")), _normed)

pattern = Call(mul, tensor("w", rank=1), _narrow, commutative=True)


def check(match: Match) -> str | None:
    """The weight covers the last dimension, types come out as they went in, and the steps stay inside."""
    x, result = match.val("x"), match.root.meta["val"]
    if not same_size(match.val("w").shape[0], x.shape[-1]):
        return f"the weight has {match.val('w').shape[0]} values for rows of {x.shape[-1]}"
    if result.dtype != x.dtype:
        return f"the result is {result.dtype}, not {x.dtype}"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op."""
    normed = rewriter.call(RMS_NORM.overload, match["x"], match["w"], float(match["eps"]))
    rewriter.replace(match.root, normed)


PASS = register(Pass("fuse_rms_norm", "fuse", pattern, rewrite, check))
