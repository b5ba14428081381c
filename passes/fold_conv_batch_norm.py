"""BatchNorm(Conv(x, w, b)) -> Conv(x, w * g, (b - mean) * g + beta), with g = gamma / sqrt(var + eps)."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import users_outside
from graphopt.ir.pattern import ANY, Call, Match, Var, argument

aten = torch.ops.aten

CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),  # "same", "valid"
)
_GEOMETRY = ("stride", "padding", "dilation", "groups")

pattern = Call(
    aten.batch_norm.default,
    Call(CONVOLUTIONS, ANY, Var("w"), Var("b"), **dict.fromkeys(_GEOMETRY, ANY), name="conv"),
    Var("gamma"),
    Var("beta"),
    Var("mean"),
    Var("var"),
    training=False,
    momentum=ANY,
    eps=Var("eps"),
    cudnn_enabled=ANY,
)


def check(match: Match) -> str | None:
    """Weights and statistics must be constants, and the convolution's own result must not be read."""
    for name in ("w", "b", "gamma", "beta", "mean", "var"):
        if match[name] is not None and match.constant(name) is None:
            return f"{name} is not a constant"
    reader = next(users_outside(match["conv"], match.nodes), None)
    if reader is not None:
        return f"the convolution's result is also read by {reader.name}"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Scale the filters and shift the bias, computed in float64."""
    weight, mean, var = (match.constant(name) for name in ("w", "mean", "var"))
    assert weight is not None and mean is not None and var is not None
    wide = [None if match[n] is None else match.constant(n).double() for n in ("gamma", "beta", "b")]  # type: ignore[union-attr]
    gamma, beta, bias = wide
    scale = torch.rsqrt(var.double() + match["eps"])
    if gamma is not None:
        scale = scale * gamma
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias * scale
    if beta is not None:
        shift = shift + beta
    per_filter = scale.reshape(-1, *[1] * (weight.dim() - 1))
    names = ("w", "b", "gamma", "beta", "mean", "var")
    made_from = [match[name] for name in names if match[name] is not None]
    folded = rewriter.constant(
        (weight.double() * per_filter).to(weight.dtype), made_from, "batch norm folded"
    )
    shifted = rewriter.constant(shift.to(weight.dtype), made_from, "batch norm folded")
    conv = match["conv"]
    geometry = (argument(conv, name) for name in _GEOMETRY)
    rewriter.replace(
        match.root, rewriter.call(conv.target, argument(conv, "input"), folded, shifted, *geometry)
    )


PASS = register(Pass("fold_conv_batch_norm", "fold", pattern, rewrite, check))
