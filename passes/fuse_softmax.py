"""exp(x - max(x)) / sum(exp(x - max(x))) -> softmax(x), along one dimension; so exp(log_softmax(x))."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument, shared_inside

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every exponential that is divided by its own sum, or that undoes a logarithm of a softmax."""
    for exp in graph.fx.find_nodes(op="call_function", target=aten.exp.default):
        if exp._erased:
            continue
        shifted: Any = exp.args[0]
        if shifted.target is aten.log_softmax.int and argument(shifted, "dtype") is None:
            bindings = {"x": shifted.args[0], "dim": argument(shifted, "dim")}
            yield Match(graph, exp, (shifted, exp), bindings)
        elif shifted.target is aten.sub.Tensor and argument(shifted, "alpha") == 1:
            yield from _after_logsumexp(graph, exp, shifted)
        yield from _divided(graph, exp)


def _after_logsumexp(graph: Graph, exp: fx.Node, shifted: fx.Node) -> Iterator[Match]:
    """exp(x - logsumexp(x))."""
    x, along = shifted.args[0], _along(shifted.args[1], aten.logsumexp.default)
    if along is not None and along[0] is x:
        _, dim, nodes = along
        yield Match(graph, exp, tuple(sorted((*nodes, shifted, exp))), {"x": x, "dim": dim})


def _divided(graph: Graph, exp: fx.Node) -> Iterator[Match]:
    """exp(...) / sum(exp(...)), with what is known of the exponent."""
    for root in list(exp.users):
        divisor = _divisor(root, exp)
        along = None if divisor is None else _along(divisor[0], aten.sum.dim_IntList)
        if divisor is None or along is None or along[0] is not exp:
            continue
        _, dim, nodes = along
        inside = {*nodes, *divisor[1], exp, root}
        shifted: Any = exp.args[0]
        bindings: dict[str, Any] = {"dim": dim}
        if shifted.target is aten.sub.Tensor and argument(shifted, "alpha") == 1:
            top = _along(shifted.args[1], aten.amax.default) or _along(shifted.args[1], aten.max.dim)
            if top is not None and top[0] is shifted.args[0] and top[1] == dim:
                bindings["x"] = top[0]
                inside |= {shifted, *top[2]}
        yield Match(graph, root, tuple(sorted(inside)), bindings)


def _divisor(root: fx.Node, exp: fx.Node) -> tuple[Any, tuple[fx.Node, ...]] | None:
    """What a node divides an exponential by, and the nodes in between: 1 / sum may be multiplied instead."""
    if root.target is aten.div.Tensor and root.args[0] is exp:
        return root.args[1], ()
    if root.target is aten.mul.Tensor:
        other: Any = root.args[1] if root.args[0] is exp else root.args[0]
        if isinstance(other, fx.Node) and other.target is aten.reciprocal.default:
            return other.args[0], (other,)
    return None


def _along(node: Any, reduction: Any) -> tuple[Any, int, tuple[fx.Node, ...]] | None:
    """For a reduction along one dimension that is kept: its input, the dimension, and its nodes."""
    inserted = None
    nodes: list[fx.Node] = []
    if isinstance(node, fx.Node) and node.target is aten.unsqueeze.default:
        inserted = argument(node, "dim") % node.meta["val"].dim()
        nodes.append(node)
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        nodes.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not reduction:
        return None
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    source: Any = node.args[0]
    plain = "dtype" not in node.kwargs or node.kwargs["dtype"] is None
    if dims is None or len(dims) != 1 or not plain:
        return None
    dim = dims[0] % source.meta["val"].dim()
    kept = inserted is None if argument(node, "keepdim") else inserted == dim
    return (source, dim, (node, *nodes)) if kept else None


def check(match: Match) -> str | None:
    """The maximum must be subtracted; nothing else may read what is inside."""
    if "x" not in match.bindings:
        return "its own maximum is not subtracted first: it overflows where softmax does not"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Name it."""
    rewriter.replace(match.root, rewriter.call(aten.softmax.int, match["x"], match["dim"]))


PASS = register(Pass("fuse_softmax", "fuse", pattern, rewrite, check))
