"""f(x)[:, -1] -> f(x[:, -1]): positions that nobody reads are not computed, back to where they are mixed.

The slice of the last token's logits moves in front of the head, the last norm, the last feed-forward block
and the query's side of the last attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size, size_hint
from graphopt.ir.pattern import Match, argument
from graphopt.passes._tokens import Region, behind, is_last, is_view, region, with_positions

aten = torch.ops.aten

_LAYERS = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
_SLICES = (aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.index.Tensor)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every slice of a computed value, with all that computes only what it takes."""
    for node in graph.calls:
        dim = None if node._erased or node.target not in _SLICES else _dim(node)
        if dim is None or not node.meta["val"].is_floating_point():
            continue
        source: Any = node.args[0]
        if same_size(source.meta["val"].shape[dim], 1):
            continue
        slices = sorted(user for user in source.users if _same(user, node))
        last = _takes_last(node, dim)
        if slices[-1] is not node or not behind(source, dim, last):
            continue
        found = region(source, dim, slices, last)
        hoists = source in found.nodes and not all(map(is_view, found.nodes))
        if hoists or (not found.nodes and source.target in _LAYERS):
            nodes = (*sorted(found.nodes or [source]), *slices)
            yield Match(graph, node, nodes, {"region": found, "source": source, "slices": slices})


def check(match: Match) -> str | None:
    """Nobody may read the other positions, and there must be other positions."""
    source, node = match["source"], match.root
    other = next((user for user in source.users if user not in match["slices"]), None)
    if other is not None:
        return f"{source.name} is also read by {other.name}, which needs the other positions"
    dim = _dim(node)
    assert dim is not None
    if node.target in (aten.index_select.default, aten.index.Tensor):
        taken, size = node.meta["val"].shape[dim], source.meta["val"].shape[dim]
        if size_hint(taken) >= size_hint(size):
            return f"it takes {size_hint(taken)} of {size_hint(size)} positions"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Take the positions where they are mixed for the last time, and compute the rest for them alone."""
    found: Region = match["region"]
    new: dict[tuple[fx.Node, int], fx.Node] = {}

    def taken(node: fx.Node, dim: int) -> fx.Node:
        if (node, dim) not in new:
            new[node, dim] = _take(rewriter, match.root, node, dim)
        return new[node, dim]

    for node in sorted(found.nodes):
        dim = found.nodes[node]
        sources = behind(node, dim, found.last)
        assert sources is not None
        given = {source: taken(source, at) for source, at in sources.items()}
        length = next(iter(given.values())).meta["val"].shape[next(iter(sources.values()))]
        args, kwargs = with_positions(node, dim, length, found.last)
        mapped: Any = fx.map_arg((args, kwargs), partial(_given, given))
        new[node, dim] = rewriter.call(node.target, *mapped[0], **mapped[1])  # type: ignore[arg-type]
    source = match["source"]
    result = new[source, found.nodes[source]]
    for node in match["slices"]:
        rank = len(source.meta["val"].shape)
        at = argument(node, "dim") % rank if node.target is aten.select.int else None
        rewriter.replace(node, result if at is None else rewriter.call(aten.select.int, result, at, 0))


def _given(given: dict[fx.Node, fx.Node], source: fx.Node) -> fx.Node:
    return given.get(source, source)


def _dim(node: fx.Node) -> int | None:
    """The dimension that a slice with fixed bounds takes from, counted from the end, or None."""
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        given = [dim for dim, index in enumerate(indices) if index is not None]
        fits = len(given) == 1 and indices[given[0]].meta["val"].dim() == 1
        fits = fits and indices[given[0]].meta["val"].dtype in (torch.int64, torch.int32)
        return given[0] - rank if fits else None
    dim = int(argument(node, "dim") % rank - rank)
    if node.target is aten.slice.Tensor:
        bounds = [argument(node, name) for name in ("start", "end", "step")]
        whole = same_shape(node.meta["val"].shape, source.meta["val"].shape)
        return None if whole or any(isinstance(bound, fx.Node) for bound in bounds) else dim
    if node.target is aten.select.int:
        return dim if isinstance(argument(node, "index"), int) else None
    return dim if argument(node, "index").meta["val"].dim() == 1 else None


def _same(node: fx.Node, other: fx.Node) -> bool:
    return node.target is other.target and node.args == other.args and node.kwargs == other.kwargs


def _takes_last(node: fx.Node, dim: int) -> bool:
    """True when exactly the last position is taken."""
    source: Any = node.args[0]
    size = source.meta["val"].shape[dim]
    if node.target is aten.select.int:
        return is_last(argument(node, "index"), size)
    if node.target is not aten.slice.Tensor or not is_last(argument(node, "start"), size):
        return False
    return same_size(node.meta["val"].shape[dim], 1)


def _take(rewriter: Rewriter, like: fx.Node, node: fx.Node, dim: int) -> fx.Node:
    """The same positions of another value; a single one keeps its dimension."""
    at = len(node.meta["val"].shape) + dim
    if like.target is aten.select.int:
        index = argument(like, "index")
        return rewriter.call(aten.slice.Tensor, node, at, index, 2**63 - 1 if index == -1 else index + 1)
    if like.target is aten.slice.Tensor:
        bounds = [argument(like, name) for name in ("start", "end", "step")]
        return rewriter.call(aten.slice.Tensor, node, at, *bounds)
    indices: Any = like.args[1]
    index = argument(like, "index") if like.target is aten.index_select.default else _only(indices)
    return rewriter.call(aten.index_select.default, node, at, index)


def _only(indices: list[fx.Node | None]) -> fx.Node:
    return next(index for index in indices if index is not None)


PASS = register(Pass("hoist_slice", "prune", pattern, rewrite, check))
