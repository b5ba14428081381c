"""Pointwise steps that compute a known activation -> that activation: gelu, silu, mish, hardswish, ..."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import Match, shared_inside
from graphopt.passes._activations import NAMED, Identified, Number, Operand, Step, identify
from graphopt.passes._pointwise import is_pointwise, literal

_MAX_STEPS = 24  # the longest spelling has about ten


def pattern(graph: Graph) -> Iterator[Match]:
    """At every pointwise call, the last first, the longest chain behind it that computes something known."""
    for root in reversed(graph.calls):
        if root._erased or not is_pointwise(root) or not root.meta["val"].is_floating_point():
            continue
        near: Match | None = None
        for match in _chains(graph, root):
            if match["found"].refusal is None:
                yield match
                break
            near = match
        else:
            if near is not None:
                yield near


def check(match: Match) -> str | None:
    """A floating value, the very function, and nothing else may read the steps in between."""
    if not match.val("x").is_floating_point():
        return f"the value is {match.val('x').dtype}, not floating"
    if match["found"].refusal is not None:
        return str(match["found"].refusal)
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op, named by what was computed."""
    known = match["found"].activation
    rewriter.replace(match.root, rewriter.call(known.target, match["x"], *known.args, **dict(known.kwargs)))


def _chains(graph: Graph, root: fx.Node) -> Iterator[Match]:
    """Every chain that ends in a node, reads one tensor and is known, the longest first."""
    found = []
    inside: list[fx.Node] = []
    frontier = {root}
    while frontier and len(inside) < _MAX_STEPS:
        node = max(frontier)
        if not _is_step(node, root):
            break
        frontier.remove(node)
        inside.append(node)
        frontier |= {source for source in node.all_input_nodes if literal(graph, source) is None}
        if len(frontier) == 1:
            (x,) = frontier
            identified = _identified(graph, x, sorted(inside))
            if identified is not None:
                nodes = tuple(sorted({*inside, *_literals_of(graph, inside)}))
                found.append(Match(graph, root, nodes, {"x": x, "found": identified}))
    return reversed(found)


def _is_step(node: fx.Node, root: fx.Node) -> bool:
    return is_pointwise(node) and same_shape(node.meta["val"].shape, root.meta["val"].shape)


def _identified(graph: Graph, x: fx.Node, nodes: list[fx.Node]) -> Identified | None:
    """What the nodes compute of ``x``, unless that is one op already, or another shape or type comes out."""
    before, after = x.meta.get("val"), nodes[-1].meta["val"]
    if not isinstance(before, torch.Tensor) or not same_shape(before.shape, after.shape):
        return None
    if before.is_floating_point() and before.dtype != after.dtype:
        return None
    if len(nodes) == 1 and nodes[0].target in NAMED:
        return None
    if any(_narrows(node, after.dtype) for node in nodes):
        return None
    return identify(_steps(graph, x, nodes), after.dtype)


def _narrows(node: fx.Node, dtype: torch.dtype) -> bool:
    """True for a step that rounds more than the result does: its rounding may be what is wanted."""
    step = node.meta["val"].dtype
    return step.is_floating_point and torch.finfo(step).eps > torch.finfo(dtype).eps


def _steps(graph: Graph, x: fx.Node, nodes: list[fx.Node]) -> tuple[Step, ...]:
    index = {x: 0, **{node: place for place, node in enumerate(nodes, 1)}}

    def read(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return tuple(value) if isinstance(value, list) else value
        if value in index:
            return Operand(index[value])
        number = literal(graph, value)
        assert number is not None
        return Number(number)

    return tuple(
        Step(node.target, tuple(map(read, node.args)), tuple((k, read(v)) for k, v in node.kwargs.items()))
        for node in nodes
    )


def _literals_of(graph: Graph, nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The calls that only fill a tensor for these nodes."""
    inside = set(nodes)
    for node in nodes:
        for source in node.all_input_nodes:
            filled = source.op == "call_function" and literal(graph, source) is not None
            if filled and inside.issuperset(source.users):
                yield source


PASS = register(Pass("fuse_activation", "fuse", pattern, rewrite, check))
