"""activation(linear(x, w, b)) -> dynamic_quantized_linear(x, w8, scale, b, activation)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.compiler import cpu
from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.dynamic_quantized_linear import OP as DYNAMIC_QUANTIZED_LINEAR
from graphopt.kernels.linear_activation import OP as LINEAR_ACTIVATION

aten = torch.ops.aten

_LINEARS = (aten.linear.default, LINEAR_ACTIVATION.overload)
_MIN_WEIGHTS = 4096  # below, quantizing the input takes as long as the product in float32


def pattern(graph: Graph) -> Iterator[Match]:
    """Every projection, with or without an activation."""
    for node in graph.calls:
        if not node._erased and node.target in _LINEARS:
            yield Match(graph, node, (node,), {"weight": argument(node, "weight")})


def check(match: Match) -> str | None:
    """The weight is a constant of some size, in float32 on the CPU, and nothing is added behind it."""
    weight, x = match.constant("weight"), argument(match.root, "input" if _is_plain(match.root) else "x")
    if weight is None:
        return "the weight is not a constant"
    if weight.dtype != torch.float32 or x.meta["val"].dtype != torch.float32 or weight.dim() != 2:
        return f"the weight is {weight.dtype} of {weight.dim()} dimensions, not float32 of 2"
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}: int8 is for the CPU"
    if weight.numel() < _MIN_WEIGHTS:
        return f"{weight.numel()} weights are too few: quantizing the input would take as long"
    if not bool(weight.isfinite().all()):
        return "the weight is not finite"
    if not _is_plain(match.root) and argument(match.root, "residual") is not None:
        return "a residual is added behind the activation"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Round the weight to a scale for each output; the input is quantized at each call."""
    root, weight, source = match.root, match.constant("weight"), match["weight"]
    assert weight is not None
    codes, scale = quantized(weight, 127 if cpu.features().vnni else 63)
    made = rewriter.constant(codes, [source], "in int8"), rewriter.constant(scale, [source], "a scale a row")
    x = argument(root, "input" if _is_plain(root) else "x")
    epilogue = () if _is_plain(root) else (argument(root, "activation"), argument(root, "parameter"))
    given = (x, *made, argument(root, "bias"), *epilogue)
    rewriter.replace(root, rewriter.call(DYNAMIC_QUANTIZED_LINEAR.overload, *given))


def quantized(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 within +-largest, and a scale for each row: (N, K) and (N,)."""
    scale = weight.abs().amax(1) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale[:, None]).round().clamp(-largest, largest).to(torch.int8), scale


def _is_plain(node: fx.Node) -> bool:
    return node.target is aten.linear.default


PASS = register(Pass("quantize_linear_int8", "cast", pattern, rewrite, check, level=3, exact=False))
