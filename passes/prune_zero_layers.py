"""x + branch(y) -> x, or x + b, where the branch ends in a layer whose weights are all zero, of bias b.

Exact for finite values: 0 times a value is taken for 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import Match, argument
from graphopt.passes._channels import Layer, layer
from graphopt.passes._ranges import as_uniform

aten = torch.ops.aten

_KEEP_ZERO = frozenset(
    {
        *(aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default),
        *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.slice.Tensor),
        *(aten.to.dtype, aten.neg.default, aten.relu.default, aten.gelu.default, aten.silu.default),
        *(aten.tanh.default, aten.dropout.default),
    }
)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every sum with the result of a layer of zeros, whatever lies between them keeps zeros."""
    chains: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.calls:
        if node._erased:
            continue
        if _is_zero(graph, node):
            chains[node] = (node,)
            continue
        source = next((s for s in node.all_input_nodes if s in chains), None)
        if source is None:
            continue
        if node.target is aten.mul.Tensor or (node.target in _KEEP_ZERO and source is node.args[0]):
            chains[node] = (*chains[source], node)
        elif node.target in (aten.add.Tensor, aten.sub.Tensor):
            yield from _sums(graph, node, chains)


def _sums(graph: Graph, node: fx.Node, chains: dict[fx.Node, tuple[fx.Node, ...]]) -> Iterator[Match]:
    """The sum with the branch that is zero; of a difference, only what is subtracted."""
    x, branch = node.args[:2]
    if branch not in chains and node.target is aten.add.Tensor:
        x, branch = branch, x
    if branch in chains and isinstance(x, fx.Node):
        chain = chains[branch]  # type: ignore[index]
        yield Match(graph, node, (*chain, node), {"x": x, "layer": chain[0], "branch": branch})


def check(match: Match) -> str | None:
    """The sum must have the shape and type of what is left, and a bias must be added as it is."""
    x, result = match.val("x"), match.root.meta["val"]
    if x.dtype != result.dtype or not same_shape(x.shape, result.shape):
        return f"the branch is zero, but it turns {list(x.shape)} into {list(result.shape)}"
    if _bias(match) is None:
        return None
    if match["layer"] is match["branch"] and argument(match.root, "alpha") == 1:
        return None
    return "the branch is a constant, which is not added as it is"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Drop the branch, but for its bias."""
    found = _bias(match)
    if found is None:
        rewriter.replace(match.root, match["x"])
        return
    bias: Any = found.bias
    if found.dim < -1:  # one value a channel, in front of the dimensions of an image
        value = match.graph.constant(bias)
        assert value is not None
        bias = rewriter.constant(value.reshape(-1, *[1] * (-1 - found.dim)), [bias], "reshaped")
    rewriter.replace(match.root, rewriter.call(match.root.target, match["x"], bias))  # type: ignore[arg-type]


def _bias(match: Match) -> Layer | None:
    """The layer of zeros, where it has a bias that is not zero."""
    one = layer(match.graph, match["layer"])
    if one is None or one.bias is None or as_uniform(match.graph, one.bias) == 0:
        return None
    return one


def _is_zero(graph: Graph, node: fx.Node) -> bool:
    """True for a layer whose weights are all zero, and for a product with a constant of zeros (a gate)."""
    one = layer(graph, node)
    if one is not None:
        return as_uniform(graph, one.weight) == 0
    factors = node.args[:2] if node.target is aten.mul.Tensor else ()
    return any(graph.constant(factor) is not None and as_uniform(graph, factor) == 0 for factor in factors)


PASS = register(Pass("prune_zero_layers", "prune", pattern, rewrite, check))
