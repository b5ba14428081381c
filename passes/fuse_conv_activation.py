"""act(conv(x, w, b) [+ r]) -> conv_activation(x, w, b, act, r)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.conv_activation import OP as CONV_ACTIVATION
from graphopt.passes._epilogue import activations, named, only_reader, summands

aten = torch.ops.aten

_PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_NAMED_PADDING = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every activation of a convolution, or of the sum of one and a shortcut."""
    for act in activations(graph):
        source = act.args[0]
        pair = summands(source)
        if isinstance(source, fx.Node) and source.target in (*_PLAIN, *_NAMED_PADDING):
            bound = {"conv": source, "act": act, "residual": None}
            yield Match(graph, act, (source, act), bound)
        elif pair is not None and isinstance(source, fx.Node):
            # of two branches that end in a convolution, the later one: the other is there when it is added
            for conv, residual in sorted([pair, pair[::-1]], reverse=True):
                if conv.target in (*_PLAIN, *_NAMED_PADDING) and only_reader(conv) is source:
                    bound = {"conv": conv, "act": act, "residual": residual}
                    yield Match(graph, act, (conv, source, act), bound)
                    break


def check(match: Match) -> str | None:
    """A batch, padding that numbers can say, and nothing else reads what lies inside."""
    conv = match["conv"]
    if argument(conv, "input").meta["val"].dim() != argument(conv, "weight").meta["val"].dim():
        return "the convolution's input has no batch dimension"
    if _padding(conv) is None:
        return "the padding differs between the two sides"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One pass over the result instead of one a step."""
    conv = match["conv"]
    operands = (argument(conv, name) for name in ("input", "weight", "bias"))
    geometry = (_each(conv, "stride"), _padding(conv), _each(conv, "dilation"), argument(conv, "groups"))
    activation = named(match["act"])
    assert activation is not None
    fused = rewriter.call(CONV_ACTIVATION.overload, *operands, *geometry, *activation, match["residual"])
    rewriter.replace(match.root, fused)


def _each(conv: fx.Node, name: str) -> list[int]:
    """A number for each spatial dimension; one may stand for all of them."""
    given: Any = argument(conv, name)
    sizes: list[int] = [given] if isinstance(given, int) else list(given)
    spatial = argument(conv, "weight").meta["val"].dim() - 2
    return sizes * spatial if len(sizes) == 1 else sizes


def _padding(conv: fx.Node) -> list[int] | None:
    """Zeros on either side of each spatial dimension; None when "same" puts more on one of them."""
    if conv.target in _PLAIN:
        return _each(conv, "padding")
    kernel = argument(conv, "weight").meta["val"].shape[2:]
    if argument(conv, "padding") == "valid":
        return [0] * len(kernel)
    reach = [(size - 1) * dilation for size, dilation in zip(kernel, _each(conv, "dilation"), strict=True)]
    return None if any(total % 2 for total in reach) else [total // 2 for total in reach]


PASS = register(Pass("fuse_conv_activation", "fuse", pattern, rewrite, check))
