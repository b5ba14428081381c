"""reshape(reshape(x, s), t) -> reshape(x, t), or x where t is its shape; unsqueeze and squeeze alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match, argument

aten = torch.ops.aten

RESHAPES = (
    *(aten.reshape.default, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every reshape of a reshaped value, with the value that the whole chain starts from.

    A chain that lies inside a longer one is left to that one, unless its last value is read beside it.
    """
    for node in graph.calls:
        if node._erased or not _is_reshape(node):
            continue
        if node.users and all(map(_is_reshape, node.users)):
            continue
        chain, source = [node], node.all_input_nodes[0]
        while _is_reshape(source):
            chain.append(source)
            source = source.all_input_nodes[0]
        if len(chain) > 1:
            yield Match(graph, node, tuple(reversed(chain)), {"source": source})


def check(match: Match) -> str | None:
    """Every size of the result must be a number, a size of the source, or the only other one."""
    others = [dim for dim, source in _symbolic(match).items() if source is None]
    if match.root.target is aten.reshape.default or len(others) < 2:
        return None
    return f"the sizes of its dimensions {others} are not sizes of {match['source'].name}"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One reshape; inner ones that others read stay."""
    source, result = match["source"], match.root.meta["val"]
    if same_shape(source.meta["val"].shape, result.shape):
        rewriter.replace(match.root, source)
        return
    if match.root.target is aten.reshape.default:  # its sizes are right, whatever was reshaped before
        sizes = argument(match.root, "shape")
    else:
        sizes = list(result.shape)
        for dim, origin in _symbolic(match).items():
            sizes[dim] = -1 if origin is None else rewriter.call(aten.sym_size.int, source, origin)
    rewriter.replace(match.root, rewriter.call(aten.reshape.default, source, sizes))


def _is_reshape(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in RESHAPES


def _symbolic(match: Match) -> dict[int, int | None]:
    """The dynamic dimensions of the result, each with a dimension of the source of that size, if any."""
    before, after = match["source"].meta["val"].shape, match.root.meta["val"].shape
    return {
        dim: next((origin for origin, other in enumerate(before) if same_size(other, size)), None)
        for dim, size in enumerate(after)
        if not isinstance(size, int)
    }


PASS = register(Pass("merge_reshapes", "prune", pattern, rewrite, check, opens=("fold_sizes",)))
