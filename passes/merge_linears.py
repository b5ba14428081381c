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
from graphopt.ir.graph import Graph, users_outside
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.kernels.rope import OP as ROPE
from graphopt.passes._epilogue import is_activation

aten = torch.ops.aten

_MAX_ROWS = 8192  # of a product that is still narrow enough to gain: a vocabulary head is not merged
_MAX_COPY = 1 << 20  # bytes of a weight that may be kept twice, because others read it too

_Key = tuple[Any, torch.dtype]  # the input, and the type


def pattern(graph: Graph) -> Iterator[Match]:
    """Groups of linear layers that read one value: those of each attention, then whatever is left."""
    grouped: list[list[fx.Node]] = []
    for attention in graph.fx.find_nodes(op="call_function", target=ATTENTION.overload):
        sources: Any = attention.args[:3]
        found = [node for source in sources if (node := _projection(source)) is not None]
        grouped += [found] if len(found) > 1 else []  # one alone may go with what is left
    taken = {node for members in grouped for node in members}
    linears = graph.fx.find_nodes(op="call_function", target=aten.linear.default)
    grouped.append([node for node in linears if node not in taken and not _has_epilogue(node)])
    for members in grouped:
        yield from _groups(graph, members)


def check(match: Match) -> str | None:
    """Weights and biases must be constants, and cheap to stack."""
    weights = [argument(node, "weight") for node in match.nodes]
    parts = [match.graph.constant(weight) for weight in weights]
    if any(part is None for part in parts):
        return "a weight is not a constant"
    if any(
        argument(n, "bias") is not None and match.graph.constant(argument(n, "bias")) is None
        for n in match.nodes
    ):
        return "a bias is not a constant"
    rows = sum(part.shape[0] for part in parts if part is not None)
    if rows > _MAX_ROWS:
        return f"the merged product would have {rows} rows"
    for weight, part in zip(weights, parts, strict=True):
        reader = next(users_outside(weight, match.nodes), None)
        if reader is not None and part is not None and part.nbytes > _MAX_COPY:
            name = match.graph.constants[str(weight.target)].sources[0]
            return f"{reader.name} reads {name} too: a copy of {part.nbytes} bytes would be kept"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Stack the weights, multiply once, split the result."""
    weights = [argument(node, "weight") for node in match.nodes]
    biases = [argument(node, "bias") for node in match.nodes]
    weight = rewriter.constant(_stack(match.graph, weights), weights, "stacked")
    bias = None
    if any(node is not None for node in biases):
        own = [node for node in biases if node is not None]
        how = "stacked" if len(own) == len(biases) else "stacked, with zeros where there is none"
        bias = rewriter.constant(_stacked_biases(match.graph, weights, biases), own, how)
    product = rewriter.call(aten.linear.default, match["x"], weight, bias)
    sizes = [node.meta["val"].shape[-1] for node in match.nodes]
    parts = rewriter.call(aten.split_with_sizes.default, product, sizes, -1)
    for index, node in enumerate(match.nodes):
        rewriter.replace(node, rewriter.call(operator.getitem, parts, index))


def _groups(graph: Graph, linears: list[fx.Node]) -> Iterator[Match]:
    """The linear layers by what they read, where there are several."""
    groups: dict[_Key, list[fx.Node]] = defaultdict(list)
    for linear in dict.fromkeys(linears):
        if not linear._erased and argument(linear, "weight").meta["val"].dim() == 2:
            groups[linear.args[0], linear.meta["val"].dtype].append(linear)
    for group in groups.values():
        if len(group) > 1:
            members = tuple(sorted(group))
            yield Match(graph, members[-1], members, {"x": members[0].args[0]})


def _has_epilogue(linear: fx.Node) -> bool:
    """True for a projection whose only reader is an activation: the two are one kernel."""
    return len(linear.users) == 1 and is_activation(next(iter(linear.users)))


def _stack(graph: Graph, nodes: list[fx.Node]) -> torch.Tensor:
    return torch.cat([part for node in nodes if (part := graph.constant(node)) is not None])


def _stacked_biases(graph: Graph, weights: list[fx.Node], biases: list[fx.Node | None]) -> torch.Tensor:
    """The biases one behind the other, zeros for a layer without (Whisper's keys have none)."""
    parts = []
    for weight, bias in zip(weights, biases, strict=True):
        own, matrix = graph.constant(bias), graph.constant(weight)
        assert matrix is not None
        parts.append(matrix.new_zeros(matrix.shape[0]) if own is None else own)
    return torch.cat(parts)


def _projection(node: Any) -> fx.Node | None:
    """The linear layer behind an attention input: through views, head norms and rotary embeddings."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _THROUGH:
        node = node.args[0]
    is_linear = isinstance(node, fx.Node) and node.target is aten.linear.default
    return node if is_linear else None


_THROUGH = {
    *(aten.reshape.default, aten.transpose.int, aten.permute.default),
    *(ROPE.overload, RMS_NORM.overload),
    *(operator.getitem, aten.split_with_sizes.default),  # what is merged already
}

PASS = register(Pass("merge_linears", "fuse", pattern, rewrite, check))
