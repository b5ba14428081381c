"""relu(conv(x, w, b)) -> quantized_conv(x, w8, scale, b32, steps): also without the relu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.calibration import observed
from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.conv_activation import OP as CONV_ACTIVATION
from graphopt.kernels.quantized_conv import OP as QUANTIZED_CONV
from graphopt.passes._convolutions import each, padding
from graphopt.passes._projections import largest_code, rows_in_int8

aten = torch.ops.aten

_READ: dict[Any, str] = {
    aten.conv2d.default: "input",
    aten.conv2d.padding: "input",
    CONV_ACTIVATION.overload: "x",
}
_LARGEST_BIAS = 2.0**31 - 1


def pattern(graph: Graph) -> Iterator[Match]:
    """Every convolution of images."""
    for node in graph.calls:
        if not node._erased and node.target in _READ and node.meta["val"].dim() == 4:
            yield Match(graph, node, (node,))


def source(conv: fx.Node) -> fx.Node:
    """What a convolution reads; another node once what computes it was rewritten."""
    found: fx.Node = argument(conv, _READ[conv.target])
    return found


def check(match: Match) -> str | None:
    """Constants in float32 on the CPU, no epilogue but a relu, and ranges that were observed."""
    conv = match.root
    weight, bias = (match.graph.constant(argument(conv, name)) for name in ("weight", "bias"))
    if weight is None or (bias is None and argument(conv, "bias") is not None):
        return "the weight or the bias is not a constant"
    if weight.dtype != torch.float32 or source(conv).meta["val"].dtype != torch.float32:
        return f"the weight is {weight.dtype}, not float32"
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}: integers are for the CPU"
    if not bool(weight.isfinite().all()):
        return "the weight is not finite"
    if conv.target is CONV_ACTIVATION.overload:
        if argument(conv, "residual") is not None or argument(conv, "activation") not in ("none", "relu"):
            return "codes cannot say what follows the convolution"
    elif padding(conv) is None:
        return "the padding differs between the two sides"
    ranges = [observed(conv, name) for name in ("x", "out")]
    if any(found is None for found in ranges):
        return "nobody has observed the range of its input or of its result"
    sound = all(found is not None and found.is_sound for found in ranges)
    return None if sound else "the range of its input or of its result is not finite, or 0 alone"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Steps from what was observed; the weight is rounded to a scale for each channel that comes out."""
    conv, graph = match.root, match.graph
    weight, bias = (graph.constant(argument(conv, name)) for name in ("weight", "bias"))
    ranges = observed(conv, "x"), observed(conv, "out")
    assert weight is not None
    assert ranges[0] is not None
    assert ranges[1] is not None
    (x_step, x_zero), (out_step, out_zero) = (found.fixed() for found in ranges if found is not None)
    codes, scale = rows_in_int8(weight, largest_code())
    origin = argument(conv, "weight")
    made: list[Any] = [
        rewriter.constant(codes, [origin], "in int8"),
        rewriter.constant(scale, [origin], "a scale a channel"),
        None,
    ]
    if bias is not None:
        units = (bias.double() / (scale.double() * x_step)).round().clamp(-_LARGEST_BIAS, _LARGEST_BIAS)
        made[2] = rewriter.constant(units.to(torch.int32), [argument(conv, "bias"), origin], "in int32")
    geometry = (*_geometry(conv), argument(conv, "groups"))
    steps = (x_step, x_zero, out_step, out_zero)
    rewriter.replace(conv, rewriter.call(QUANTIZED_CONV.overload, source(conv), *made, *geometry, *steps))


def _geometry(conv: fx.Node) -> tuple[Any, Any, Any]:
    if conv.target is CONV_ACTIVATION.overload:
        return argument(conv, "stride"), argument(conv, "padding"), argument(conv, "dilation")
    return each(conv, "stride"), padding(conv), each(conv, "dilation")


PASS = register(Pass("quantize_conv_int8", "cast", pattern, rewrite, check, level=3, exact=False))
