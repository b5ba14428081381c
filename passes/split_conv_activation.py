"""conv_activation(x, w, b, act, r) -> act(conv(x, w, b) + r): what a convolution in 8 bits rounds has a name.

A relu behind the convolution alone stays: it is the clamp of the codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.conv_activation import OP as CONV_ACTIVATION
from graphopt.passes._epilogue import applied

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every convolution of images with an epilogue that codes cannot say."""
    for node in graph.fx.find_nodes(op="call_function", target=CONV_ACTIVATION.overload):
        if node._erased or node.meta["val"].dim() != 4:
            continue
        if argument(node, "residual") is not None or argument(node, "activation") not in ("none", "relu"):
            yield Match(graph, node, (node,))


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """ONNX Runtime has the same nodes of either spelling."""
    names = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")
    out = rewriter.call(aten.conv2d.default, *(argument(match.root, name) for name in names))
    residual = argument(match.root, "residual")
    if residual is not None:
        out = rewriter.call(aten.add.Tensor, out, residual)
    epilogue = (argument(match.root, name) for name in ("activation", "parameter"))
    rewriter.replace(match.root, applied(rewriter, out, *epilogue))


PASS = register(Pass("split_conv_activation", "fold", pattern, rewrite, level=3))
