"""act(x Wg^T + bg) * (x Wu^T + bu) -> gated_mlp(x, Wg, Wu, bg, bu, act): SwiGLU, GeGLU, ReGLU."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_shape
from graphopt.ir.pattern import Call, Match, Or, Var, argument, shared_inside
from graphopt.kernels.gated_mlp import OP as GATED_MLP

aten = torch.ops.aten

_gate = Call(aten.linear.default, Var("x"), Var("gate_w"), Var("gate_b"))
_up = Call(aten.linear.default, Var("x"), Var("up_w"), Var("up_b"))
_activated = Or(
    Call(aten.silu.default, _gate, name="act"),
    Call(aten.gelu.default, _gate, approximate=Var("approximate"), name="act"),
    Call(aten.relu.default, _gate, name="act"),
)

pattern = Call(aten.mul.Tensor, _activated, _up, commutative=True)


def check(match: Match) -> str | None:
    """Both weights are matrices of one shape, and nothing else reads the projections."""
    gate, up = match.val("gate_w"), match.val("up_w")
    if gate.dim() != 2 or not same_shape(gate.shape, up.shape):
        return f"the weights have shapes {list(gate.shape)} and {list(up.shape)}, not one of two dimensions"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; the weights stay two, so that they are shared with the model."""
    names = ("x", "gate_w", "up_w", "gate_b", "up_b")
    args = tuple(match[name] for name in names)
    rewriter.replace(match.root, rewriter.call(GATED_MLP.overload, *args, _activation(match)))


def _activation(match: Match) -> str:
    act = match["act"]
    if act.target is aten.gelu.default:
        return "gelu_tanh" if argument(act, "approximate") == "tanh" else "gelu"
    return "silu" if act.target is aten.silu.default else "relu"


PASS = register(Pass("fuse_gated_mlp", "fuse", pattern, rewrite, check))
