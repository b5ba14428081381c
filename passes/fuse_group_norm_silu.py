"""silu(group_norm(x, G, w, b, eps)) -> group_norm_silu(x, G, w, b, eps)."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import ANY, Call, Match, Var, shared_inside
from graphopt.kernels.group_norm_silu import OP as GROUP_NORM_SILU

aten = torch.ops.aten

pattern = Call(
    aten.silu.default,
    Call(aten.group_norm.default, *map(Var, ("x", "groups", "weight", "bias", "eps")), ANY),
)


def check(match: Match) -> str | None:
    """One type, and nothing else reads the norm."""
    x = match.val("x").dtype
    for name in ("weight", "bias"):
        if match[name] is not None and match.val(name).dtype != x:
            return f"the {name} is {match.val(name).dtype}, the tensor {x}"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The activation in the pass that writes the norm."""
    given = (match[name] for name in ("x", "groups", "weight", "bias", "eps"))
    rewriter.replace(match.root, rewriter.call(GROUP_NORM_SILU.overload, *given))


PASS = register(Pass("fuse_group_norm_silu", "fuse", pattern, rewrite, check))
