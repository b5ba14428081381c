"""Norms of residual sums: where they are, what they refuse alike, and how they become one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.op import Op
from graphopt.ir.pattern import Match, argument

aten = torch.ops.aten

_MIXED = {torch.float32, torch.float16, torch.bfloat16}


def sums(graph: Graph, norm: Any, **names: str) -> Iterator[Match]:
    """Every norm of a sum of two tensors, behind views and casts of the sum that keep its rows.

    Args:
        graph: the graph.
        norm: the norm, whose first argument is what it norms.
        names: the norm's arguments to bind, by the name to bind each under.

    Returns:
        Matches that bind ``x`` and ``r`` (the summands, x the one that lends shape and type), ``sum``,
        ``sizes`` (those that the sum is reshaped to, or None), and what ``names`` asks for.
    """
    for root in graph.fx.find_nodes(op="call_function", target=norm):
        if root._erased:
            continue
        nodes, sizes = [root], None
        total = root.args[0]
        while _keeps_rows(total):
            nodes.append(total)
            if sizes is None and total.target is aten.reshape.default:
                sizes = total.args[1]
            total = total.args[0]
        if not _is_sum(total):
            continue
        x, residual = sorted(total.args[:2], key=lambda summand: not _leads(summand, root, total))
        bound = {name: argument(root, own) for name, own in names.items()}
        bound |= {"x": x, "r": residual, "sum": total, "sizes": sizes}
        yield Match(graph, root, (total, *reversed(nodes)), bound)


def _keeps_rows(node: Any) -> bool:
    """A view of the same rows, or a cast to fewer bits: what the norm reads of a sum that is kept in more."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target is aten.reshape.default:
        before, after = (n.meta["val"].shape for n in (node.args[0], node))  # type: ignore[union-attr]
        return bool(before) and bool(after) and same_size(before[-1], after[-1])
    if node.target is not aten.to.dtype:
        return False
    before, after = (n.meta["val"].dtype for n in (node.args[0], node))  # type: ignore[union-attr]
    return bool(after.is_floating_point and before != after and torch.promote_types(before, after) == before)


def _is_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or argument(node, "alpha") != 1:
        return False
    summands = [value.meta["val"] for value in node.args[:2] if isinstance(value, fx.Node)]
    return len(summands) == 2 and all(isinstance(val, torch.Tensor) and val.dim() for val in summands)


def _leads(summand: Any, norm: fx.Node, total: fx.Node) -> bool:
    """Whether a summand has the shape of the sum and the type of its norm."""
    val = summand.meta["val"]
    return same_shape(val.shape, total.meta["val"].shape) and val.dtype == norm.meta["val"].dtype


def refuse_residual(match: Match) -> str | None:
    """Why a match of ``sums`` is no residual, or None."""
    types = {match.val("x").dtype, match.val("r").dtype}
    norm = match.root.meta["val"].dtype
    if norm not in types:
        return f"the norm is {norm}, the summands are {match.val('x').dtype} and {match.val('r').dtype}"
    if len(types) > 1 and not (torch.float32 in types and types <= _MIXED):
        return f"the summands differ in type: {match.val('x').dtype} and {match.val('r').dtype}"
    if not _leads(match["x"], match.root, match["sum"]):
        shapes = f"{list(match.val('x').shape)} and {list(match.val('r').shape)}"
        return f"no summand has the shape of the sum and the type of its norm: {shapes}"
    return None


def replace(rewriter: Rewriter, match: Match, fused: Op, *rest: Any) -> None:
    """One op in place of a match of ``sums``; whoever read the sum reads the op's second output."""
    both = rewriter.call(fused.overload, match["x"], match["r"], *rest)
    normed = rewriter.call(operator.getitem, both, 0)
    if match["sizes"] is not None:
        normed = rewriter.call(aten.reshape.default, normed, match["sizes"])
    rewriter.replace(match.root, normed)
    rewriter.replace(match["sum"], rewriter.call(operator.getitem, both, 1))
