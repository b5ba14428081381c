"""linear(x, w1, b1), linear(x, w2, b2), ... -> split(linear(x, [w1; w2; ...], [b1; b2; ...])): Q, K, V."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.kernels.rope import OP as ROPE

aten = torch.ops.aten

_MAX_ROWS = 8192  # of a product that is still narrow enough to gain: a vocabulary head is not merged


def pattern(graph: Graph) -> Iterator[Match]:
    """Groups of linear layers that read one value and feed one attention."""
    for attention in graph.calls:
        if attention.target is not ATTENTION.overload or attention._erased:
            continue
        sources: Any = attention.args[:3]
        groups: dict[tuple[fx.Node, bool], list[fx.Node]] = defaultdict(list)
        for linear in dict.fromkeys(_projection(source) for source in sources):
            if linear is not None:
                groups[linear.args[0], argument(linear, "bias") is None].append(linear)  # type: ignore[index]
        for group in groups.values():
            if len(group) > 1:
                members = tuple(sorted(group))
                yield Match(graph, members[-1], members, {"x": members[0].args[0]})


def check(match: Match) -> str | None:
    """Weights and biases must be constants."""
    parts = [match.graph.constant(argument(node, "weight")) for node in match.nodes]
    if any(part is None for part in parts):
        return "a weight is not a constant"
    if any(
        argument(n, "bias") is not None and match.graph.constant(argument(n, "bias")) is None
        for n in match.nodes
    ):
        return "a bias is not a constant"
    rows = sum(part.shape[0] for part in parts if part is not None)
    return f"the merged product would have {rows} rows" if rows > _MAX_ROWS else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Stack the weights, multiply once, split the result."""
    weights = [argument(node, "weight") for node in match.nodes]
    biases = [argument(node, "bias") for node in match.nodes]
    weight = rewriter.constant(_stack(match.graph, weights), weights, "stacked")
    bias = None
    if biases[0] is not None:
        bias = rewriter.constant(_stack(match.graph, biases), biases, "stacked")
    product = rewriter.call(aten.linear.default, match["x"], weight, bias)
    sizes = [node.meta["val"].shape[-1] for node in match.nodes]
    parts = rewriter.call(aten.split_with_sizes.default, product, sizes, -1)
    for index, node in enumerate(match.nodes):
        rewriter.replace(node, rewriter.call(operator.getitem, parts, index))


def _stack(graph: Graph, nodes: list[fx.Node]) -> torch.Tensor:
    return torch.cat([part for node in nodes if (part := graph.constant(node)) is not None])


def _projection(node: Any) -> fx.Node | None:
    """The linear layer behind an attention input: through views, head norms and rotary embeddings."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _THROUGH:
        node = node.args[0]
    is_linear = isinstance(node, fx.Node) and node.target is aten.linear.default
    return node if is_linear else None


_THROUGH = {aten.reshape.default, aten.transpose.int, ROPE.overload, RMS_NORM.overload}

PASS = register(Pass("merge_linears", "fuse", pattern, rewrite, check))
