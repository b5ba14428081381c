"""Norms of residual sums, and sums of norms: where they are, what they refuse, how they become one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.op import Op
from graphopt.ir.pattern import Match, argument, shared_inside

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


def norm_sums(graph: Graph, norm: Any, **names: str) -> Iterator[Match]:
    """Every sum of two tensors one of which is a norm; see ``sums_of_norm``."""
    for root in graph.fx.find_nodes(op="call_function", target=aten.add.Tensor):
        if not root._erased:
            yield from sums_of_norm(graph, root, norm, **names)


def sums_of_norm(graph: Graph, root: fx.Node, norm: Any, **names: str) -> Iterator[Match]:
    """A call as the sum of a norm, behind a cast that the sum would make itself, and another tensor.

    Args:
        graph: the graph.
        root: the call.
        norm: the norm, whose first argument is what it norms.
        names: the norm's arguments to bind, by the name to bind each under.

    Returns:
        Matches that bind ``x`` (what is normed), ``r`` (the other summand), ``normed`` (the norm), and what
        ``names`` asks for; of two norms, the one that fewer others read comes first.
    """
    if not _is_sum(root):
        return
    pairs: Any = (root.args[:2], root.args[1::-1])
    found = [(inner, summand, other) for summand, other in pairs if (inner := _normed(summand, other, norm))]
    for inner, summand, other in sorted(found, key=lambda one: len(one[0].users) + len(one[1].users)):
        bound = {name: argument(inner, own) for name, own in names.items()}
        bound |= {"x": inner.args[0], "r": other, "normed": inner}
        yield Match(graph, root, tuple(dict.fromkeys((inner, summand, root))), bound)


def _normed(summand: fx.Node, other: fx.Node, norm: Any) -> fx.Node | None:
    """The norm that a summand is, or is before a cast to the type that the sum has anyway."""
    if summand.target is aten.to.dtype:
        inner: Any = summand.args[0]
        wide = torch.promote_types(inner.meta["val"].dtype, other.meta["val"].dtype)
        summand = inner if wide == summand.meta["val"].dtype else summand
    return summand if summand.target is norm else None


def refuse_norm_sum(match: Match) -> str | None:
    """Why a match of ``norm_sums`` is no sum of a norm and a residual, or None."""
    shared = shared_inside(match)
    if shared is not None:
        return f"{shared[0].name} is also read by {shared[1].name}"
    types = {match.val("normed").dtype, match.val("r").dtype}
    if len(types) > 1 and not (torch.float32 in types and types <= _MIXED):
        return f"the summands differ in type: {match.val('normed').dtype} and {match.val('r').dtype}"
    if not same_shape(match.val("normed").shape, match.root.meta["val"].shape):
        shapes = f"{list(match.val('normed').shape)} and {list(match.val('r').shape)}"
        return f"the norm has not the shape of the sum: {shapes}"
    return None
