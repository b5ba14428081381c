"""Add(Conv(x, w, b), Conv(y, v, c)) -> Add(Conv(x, w), Conv(y, v, b + c)): where a shortcut is a convolution.

The later one keeps a bias, which its epilogue adds with the other as its residual. cuDNN has no epilogue of a
bias alone, so that PyTorch adds it in a kernel of its own: of (64, 256, 56, 56) in float16 that reads and
writes 206 MB, 68 us at the 3 TB/s of an H100.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._epilogue import summands
from graphopt.passes._layers import CONVOLUTIONS, Layer, also_read, layer_of, refuse_range, with_arguments

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every sum of two convolutions with a bias each."""
    for total in graph.fx.find_nodes(op="call_function", target=aten.add.Tensor):
        pair = None if total._erased else summands(total)
        layers = [layer for node in sorted(pair or ()) if (layer := layer_of(graph, node)) is not None]
        if len(layers) == 2 and all(layer.node.target in CONVOLUTIONS and layer.bias for layer in layers):
            first, second = layers
            yield Match(graph, total, (first.node, second.node, total), {"first": first, "second": second})


def check(match: Match) -> str | None:
    """Constant biases, a sum of them that their type holds, and nobody else who reads a summand."""
    first, second = match["first"], match["second"]
    reason = first.constants() or second.constants()
    reason = reason or also_read(first.node, match.root) or also_read(second.node, match.root)
    if reason is not None:
        return str(reason)
    bias = _bias(first, second)
    return refuse_range(bias, bias, match.root.meta["val"].dtype)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Add the biases, in float64."""
    first, second = match["first"], match["second"]
    folded = _bias(first, second).to(match.root.meta["val"].dtype)
    bias = rewriter.constant(folded, (first.bias, second.bias), "added")
    plain = with_arguments(rewriter, first.node, bias=None)
    biased = with_arguments(rewriter, second.node, bias=bias)
    rewriter.replace(match.root, rewriter.call(aten.add.Tensor, biased, plain))


def _bias(first: Layer, second: Layer) -> torch.Tensor:
    """Both biases in one, in float64."""
    one, two = first.wide_bias(), second.wide_bias()
    assert one is not None
    assert two is not None
    return one + two


PASS = register(Pass("fold_shortcut_bias", "fold", pattern, rewrite, check))
