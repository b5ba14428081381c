"""x * rsqrt(mean(x^2, -1) + eps) * w, the mean in x's type or float32; rms_norm -> rms_norm(x, w, eps)."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_size
from graphopt.ir.pattern import Call, Match, Or, Pattern, Var, shared_inside
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.passes._scalars import close_to, number, tensor

aten = torch.ops.aten
mul = aten.mul.Tensor

_x = Var("x")


def _normed(wide: Pattern) -> Or:
    """x divided by its root mean square, spelled with rsqrt or sqrt."""
    square = Or(Call(aten.pow.Tensor_Scalar, wide, close_to(2.0)), Call(mul, wide, wide))
    mean = Call(aten.mean.dim, square, Var("dims"), True)
    above_zero = Call(aten.add.Tensor, mean, number("eps"))
    return Or(
        Call(mul, wide, Call(aten.rsqrt.default, above_zero), commutative=True),
        Call(aten.div.Tensor, wide, Call(aten.sqrt.default, above_zero)),
    )


_widened = Or(Call(aten.to.dtype, _x, torch.float32), _x)
_narrowed = Call(aten.to.dtype, _normed(_widened), Var("back"))

pattern = Or(
    Call(mul, tensor("w", rank=1), Or(_narrowed, _normed(_x)), commutative=True),
    Call(aten.rms_norm.default, tensor("x"), Var("shape"), Var("w"), Var("eps")),
)


def check(match: Match) -> str | None:
    """The weight covers the last dimension, types come out as they went in, and the steps stay inside."""
    x, result = match.val("x"), match.root.meta["val"]
    if match.get("dims", [-1]) not in ([-1], [x.dim() - 1]):
        return f"the mean is over dimensions {list(match['dims'])}, not the last"
    if len(match.get("shape", [-1])) != 1:
        return f"{len(match['shape'])} dimensions are normalised together"
    if match["w"] is None:
        return None
    if not same_size(match.val("w").shape[0], x.shape[-1]):
        return f"the weight has {match.val('w').shape[0]} values for rows of {x.shape[-1]}"
    for what, dtype in (("result", result.dtype), ("weight", match.val("w").dtype)):
        if dtype != x.dtype:
            return f"the {what} is {dtype}, not {x.dtype}"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op."""
    eps = torch.finfo(match.val("x").dtype).eps if match["eps"] is None else float(match["eps"])
    normed = rewriter.call(RMS_NORM.overload, match["x"], match["w"], eps)
    rewriter.replace(match.root, normed)


PASS = register(Pass("fuse_rms_norm", "fuse", pattern, rewrite, check))
