"""How the weights of a neighbouring layer take over a multiplication or addition of constants.

``x * scale + shift`` behind a layer goes into its weights' rows and its bias; in front of layers, into their
columns and biases. In between may stand what only moves elements: the constants are moved along.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._affine import MOVES, Affine, as_affine, by_channel, moved
from graphopt.passes._layers import Layer, also_read, layer_of, refuse_range, with_arguments

_MAX_DISTANCE = 8  # moves between a layer and what is folded into it

# Finding


@dataclass(frozen=True)
class Site:
    """An affine step and the layers that take it over: the one behind which it stands, or all that read it.

    Args:
        affine: the step.
        node: its node.
        paths: a layer each, with the moves between it and the step, in graph order.
        behind: the step stands behind its one layer.
    """

    affine: Affine | str
    node: fx.Node
    paths: tuple[tuple[Layer, tuple[fx.Node, ...]], ...]
    behind: bool


def find(graph: Graph, node: fx.Node, affine: Affine | str, kinds: tuple[str, ...]) -> Match | None:
    """The site of an affine step next to layers of some kinds; the reason that it is refused is bound.

    The layer whose result it changes comes first; what reads the step, if that one cannot take it.
    """
    source: Any = affine.source if isinstance(affine, Affine) else node.args[0]
    sites = [site for site in (_behind(graph, node, affine, source), _front(graph, node, affine)) if site]
    sites = [site for site in sites if all(layer.kind in kinds for layer, _ in site.paths)]
    found = [(site, refusal(site)) for site in sites]
    if not found:
        return None
    site, reason = next((pair for pair in found if pair[1] is None), found[0])
    nodes = {node, *(n for layer, moves in site.paths for n in (layer.node, *moves))}
    ordered = tuple(sorted(nodes))
    return Match(graph, ordered[-1], ordered, {"site": site, "reason": reason})


def _behind(graph: Graph, node: fx.Node, affine: Affine | str, source: fx.Node) -> Site | None:
    moves: list[fx.Node] = []
    while source.op == "call_function" and source.target in MOVES and len(moves) < _MAX_DISTANCE:
        moves.insert(0, source)
        source = source.args[0]  # type: ignore[assignment]
    layer = layer_of(graph, source)
    return None if layer is None else Site(affine, node, ((layer, tuple(moves)),), True)


def _front(graph: Graph, node: fx.Node, affine: Affine | str) -> Site | None:
    """Every reader must be a layer, or a move that only layers read."""
    paths = readers(graph, node)
    if not paths or any(layer is None for layer, _ in paths):
        return None
    return Site(affine, node, tuple((layer, moves) for layer, moves in paths if layer is not None), False)


def readers(graph: Graph, node: fx.Node) -> list[tuple[Layer | None, tuple[fx.Node, ...]]]:
    """Who reads a value, moved or not: the layers that multiply it, None for any other reader."""
    found: list[tuple[Layer | None, tuple[fx.Node, ...]]] = []
    work: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, ())]
    while work:
        value, moves = work.pop()
        for user in value.users:
            if user.target in MOVES and len(moves) < _MAX_DISTANCE:
                work.append((user, (*moves, user)))
                continue
            layer = layer_of(graph, user)
            reads = layer is not None and layer.kind != "lookup" and layer.source is value
            found.append((layer if reads and user.all_input_nodes.count(value) == 1 else None, moves))
    return sorted(found, key=lambda path: path[0].node if path[0] else node)


def refusal(site: Site) -> str | None:
    """Why the layers cannot take the step over, or None."""
    if isinstance(site.affine, str):
        return site.affine
    for layer, moves in site.paths:
        reason = layer.constants()
        if reason is None and site.behind:
            reason = _refuse_readers(site, layer, moves)
        if reason is None:
            reason = _refuse_values(site, layer, moves) or _refuse_sharing(layer)
        if reason is not None:
            return reason
    return None


def _refuse_readers(site: Site, layer: Layer, moves: tuple[fx.Node, ...]) -> str | None:
    """Nobody else may want the result as it was."""
    for value, reader in itertools.pairwise((layer.node, *moves, site.node)):
        if len(value.users) > 1:
            if value is layer.node and layer.kind == "convolution":
                other = next(user for user in value.users if user is not reader)
                return f"the convolution's result is also read by {other.name}"
            return also_read(value, reader)
    return None


def _refuse_sharing(layer: Layer) -> str | None:
    """A table that is both looked up and multiplied (an embedding and its head) would be held twice."""
    other = next((user for user in layer.weight.users if user.target is not layer.node.target), None)
    return None if other is None else f"the weight is also read by {other.name}: it would be held twice"


def _refuse_values(site: Site, layer: Layer, moves: tuple[fx.Node, ...]) -> str | None:
    """The constants must be one number a channel, and the weights must stay in their type's range."""
    found = _vectors(site, layer, moves)
    if isinstance(found, str):
        return found
    scale, shift = found
    if not site.behind and shift is not None and bool(shift.any()) and layer.pads():
        return "the convolution pads with zeros, which do not become the constant that is added"
    weight, bias = _new_weights(site, layer, scale, shift)
    dtype = layer.weight.meta["val"].dtype
    row = (1, 3) if layer.kind == "lookup" else (2, 3)  # of a table: what is looked up together
    reason = refuse_range(weight, layer.wide_weight(), dtype, row)
    if reason is None and bias is not None:
        reason = refuse_range(bias, bias, dtype)
    return reason


def _vectors(
    site: Site, layer: Layer, moves: tuple[fx.Node, ...]
) -> tuple[torch.Tensor, torch.Tensor | None] | str:
    """Scale and shift, one number a channel of the layer's result, or of its input."""
    assert isinstance(site.affine, Affine)
    beside = layer.node if site.behind else layer.source
    rank = beside.meta["val"].dim()
    dim = layer.channel_dim(rank)
    channels = layer.channels if site.behind else int(beside.meta["val"].shape[dim])
    found = []
    for value in (site.affine.scale, site.affine.shift):
        for move in reversed(moves) if site.behind else moves:
            if value is not None:
                value = moved(value, move, back=site.behind)
                if value is None:
                    return f"the constant cannot be moved through {move.name}, whose sizes vary"
        vector = None if value is None else by_channel(value, dim, channels)
        if isinstance(vector, str):
            return vector
        found.append(vector)
    assert found[0] is not None
    return found[0], found[1]


def _new_weights(
    site: Site, layer: Layer, scale: torch.Tensor, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (G, O, I, K) and bias (G * O,) that do the affine step too, in float64."""
    weight, bias = layer.wide_weight(), layer.wide_bias()
    groups, rows, columns, _ = weight.shape
    if site.behind:
        if layer.kind == "lookup" and shift is not None:  # a table has no bias: every row is shifted
            return weight * scale.reshape(groups, rows, 1, 1) + shift.reshape(groups, rows, 1, 1), None
        bias = None if bias is None else bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return weight * scale.reshape(groups, rows, 1, 1), bias
    if shift is not None and bool(shift.any()):
        added = (weight * shift.reshape(groups, 1, columns, 1)).sum((2, 3)).reshape(-1)
        bias = added if bias is None else bias + added
    return weight * scale.reshape(groups, 1, columns, 1), bias


# Rewriting


def fold(rewriter: Rewriter, match: Match, how: str) -> None:
    """Give the layers their new weights, and take the step away."""
    site: Site = match["site"]
    assert isinstance(site.affine, Affine)
    for layer, moves in site.paths:
        found = _vectors(site, layer, moves)
        assert not isinstance(found, str)
        weight, bias = _new_weights(site, layer, *found)
        made_from = [node for node in (layer.weight, layer.bias) if node is not None]
        made_from += site.affine.constants
        changes: dict[str, Any] = {"weight": _constant(rewriter, layer.narrow_weight(weight), made_from, how)}
        if bias is not None:
            narrow = bias.to(layer.weight.meta["val"].dtype)
            changes["bias"] = _constant(rewriter, narrow, made_from, how)
        if site.behind:
            result = with_arguments(rewriter, layer.node, **changes)
            for move in moves:
                result = rewriter.call(move.target, result, *move.args[1:], **move.kwargs)  # type: ignore[arg-type]
            rewriter.replace(site.node, result)
            continue
        source = site.affine.source
        for move in moves:
            source = rewriter.call(move.target, source, *move.args[1:], **move.kwargs)  # type: ignore[arg-type]
        rewriter.replace(layer.node, with_arguments(rewriter, layer.node, input=source, **changes))


def _constant(rewriter: Rewriter, tensor: torch.Tensor, made_from: list[fx.Node], how: str) -> fx.Node:
    """A constant; the same one where another site made it already (a table for encoder and decoder)."""
    graph = rewriter.graph
    names = (name for node in made_from for name in graph.constants[str(node.target)].sources)
    sources = tuple(dict.fromkeys(names))
    for name, known in graph.constants.items():
        if (known.how, known.sources, known.tensor.dtype) == (how, sources, tensor.dtype):
            reading: fx.Node | None = next(iter(graph.fx.find_nodes(op="get_attr", target=name)), None)
            if reading is not None and torch.equal(known.tensor, tensor):
                return reading
    return rewriter.constant(tensor, made_from, how)


def sites(graph: Graph, targets: tuple[Any, ...], kinds: tuple[str, ...]) -> Iterator[Match]:
    """Every affine step of some ops that stands next to layers of some kinds."""
    for target in targets:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            affine = None if node._erased else as_affine(graph, node)
            found = None if affine is None else find(graph, node, affine, kinds)
            if found is not None:
                yield found
