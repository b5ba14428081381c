"""act(conv(x, w, b) [+ r]) -> conv_activation(x, w, b, act, r)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.conv_activation import OP as CONV_ACTIVATION
from graphopt.passes._convolutions import NAMED_PADDING, PLAIN, each, padding
from graphopt.passes._epilogue import activations, named, only_reader, summands


def pattern(graph: Graph) -> Iterator[Match]:
    """Every activation of a convolution, or of the sum of one and a shortcut."""
    for act in activations(graph):
        source = act.args[0]
        pair = summands(source)
        if isinstance(source, fx.Node) and source.target in (*PLAIN, *NAMED_PADDING):
            bound = {"conv": source, "act": act, "residual": None}
            yield Match(graph, act, (source, act), bound)
        elif pair is not None and isinstance(source, fx.Node):
            # of two branches that end in a convolution, the later one: the other is there when it is added
            for conv, residual in sorted([pair, pair[::-1]], reverse=True):
                if conv.target in (*PLAIN, *NAMED_PADDING) and only_reader(conv) is source:
                    bound = {"conv": conv, "act": act, "residual": residual}
                    yield Match(graph, act, (conv, source, act), bound)
                    break


def check(match: Match) -> str | None:
    """A batch, padding that numbers can say, and nothing else reads what lies inside."""
    conv = match["conv"]
    if argument(conv, "input").meta["val"].dim() != argument(conv, "weight").meta["val"].dim():
        return "the convolution's input has no batch dimension"
    if padding(conv) is None:
        return "the padding differs between the two sides"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One pass over the result instead of one a step."""
    conv = match["conv"]
    operands = (argument(conv, name) for name in ("input", "weight", "bias"))
    geometry = (each(conv, "stride"), padding(conv), each(conv, "dilation"), argument(conv, "groups"))
    activation = named(match["act"])
    assert activation is not None
    fused = rewriter.call(CONV_ACTIVATION.overload, *operands, *geometry, *activation, match["residual"])
    rewriter.replace(match.root, fused)


PASS = register(Pass("fuse_conv_activation", "fuse", pattern, rewrite, check))
