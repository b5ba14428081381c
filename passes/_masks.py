"""The masks and biases of one attention as the one mask and the fill that graphopt::attention takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.kernels.attention import SWALLOWS
from graphopt.passes._scores import NotAttentionError, Term

aten = torch.ops.aten


@dataclass(frozen=True)
class Recipe:
    """How the terms become one mask.

    Args:
        kind: whether the mask says where to attend, or is added.
        fill: the op's argument: the score of what is forbidden, None for no weight at all.
        last: the last term is not added to the mask but left to the fill.
    """

    kind: Literal["none", "where", "added"]
    fill: float | None = None
    last: bool = False


def recipe(graph: Graph, terms: Sequence[Term], dtype: torch.dtype) -> Recipe:
    """How to combine the terms without changing a number.

    A finite fill replaces a score, and adding it instead is the same only where it swallows every score: from
    float32's lowest number upwards to ``SWALLOWS``.

    Raises:
        NotAttentionError: they cannot be combined.
    """
    if not terms:
        return Recipe("none")
    for term in terms:
        if term.fill is not None and term.node.meta["val"].dtype != torch.bool:
            raise NotAttentionError(
                f"the condition {term.node.name} is {term.node.meta['val'].dtype}, not bool"
            )
    fills = [term.fill for term in terms if term.fill is not None]
    if len(fills) == len(terms) and len(set(fills)) == 1:
        return Recipe("where", _within(fills[0], dtype))
    lows = [_reach(graph, term.node) for term in terms if term.fill is None]
    for fill in fills[:-1] if terms[-1].fill is not None else fills:
        if not _swallows(fill, dtype):
            raise NotAttentionError(f"scores filled with {fill:.6g} are masked or biased again")
    if terms[-1].fill is not None and not _swallows(terms[-1].fill, dtype):
        if -math.inf in fills or min(lows, default=0.0) == -math.inf:
            raise NotAttentionError(f"scores that may be -inf already are filled with {terms[-1].fill:.6g}")
        return Recipe("added", terms[-1].fill, last=True)
    tame = all(low > SWALLOWS for low in lows)
    alone = len(terms) == 1 and min(lows, default=0.0) > -math.inf
    return Recipe("added", None if (tame and -math.inf not in fills) or alone else -math.inf)


def combined(
    rewriter: Rewriter,
    terms: Sequence[Term],
    made: Recipe,
    dtype: torch.dtype,
    arranged: Callable[[Term], fx.Node],
) -> fx.Node | None:
    """Stage the one mask.

    Args:
        rewriter: builds the nodes.
        terms: masks and biases in order.
        made: how they become one.
        dtype: of the queries.
        arranged: the node of a term, broadcastable to (B, H, S, T).
    """
    mask: fx.Node | None = None
    for term in terms:
        node = arranged(term)
        if term.fill is None:
            if term.factor != 1:
                node = rewriter.call(aten.mul.Tensor, node, term.factor)
            mask = node if mask is None else rewriter.call(aten.add.Tensor, mask, node)
            continue
        keeps = node if term.keeps else rewriter.call(aten.logical_not.default, node)
        if made.kind == "where":
            mask = keeps if mask is None else rewriter.call(aten.logical_and.default, mask, keeps)
            continue
        fill = -math.inf if made.last and term is terms[-1] else _within(term.fill, dtype)
        if mask is None:
            mask = rewriter.call(aten.where.Scalar, keeps, 0.0, fill)
        else:
            mask = rewriter.call(aten.where.ScalarOther, keeps, mask, fill)
    if mask is not None and made.kind == "added" and mask.meta["val"].dtype != dtype:
        mask = rewriter.call(aten.to.dtype, mask, dtype)
    return mask


def _swallows(fill: float, dtype: torch.dtype) -> bool:
    return fill == -math.inf or (fill <= SWALLOWS and torch.finfo(dtype).min <= SWALLOWS)


def _within(fill: float, dtype: torch.dtype) -> float:
    """The fill within the range of a dtype that holds numbers which swallow, where the scores' was wider."""
    if math.isinf(fill) or not _swallows(fill, dtype):
        return fill
    return max(fill, torch.finfo(dtype).min)


def _reach(graph: Graph, bias: fx.Node) -> float:
    """The lowest number that a bias may hold: its own where it is constant, 0 for what a layer computes.

    Elsewhere it is the lowest literal on the way to it, and -inf where an input is added as it comes.
    """
    lowest, seen, work = 0.0, set[fx.Node](), [bias]
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        constant = graph.constant(node)
        if constant is not None:
            if constant.is_floating_point() and constant.numel():
                lowest = min(lowest, float(constant.min()))
        elif node.op == "placeholder":
            if node.meta["val"].dtype.is_floating_point:
                return -math.inf
        elif node.target not in _BOUNDED and isinstance(node.meta.get("val"), torch.Tensor):
            literals = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, float)]
            before = lowest
            lowest = min([lowest, *literals])
            if before <= SWALLOWS and min(literals, default=0.0) <= SWALLOWS:
                return -math.inf  # two of them may add up to it
            work.extend(source for source in node.all_input_nodes if source.meta["val"] is not None)
    return lowest


_BOUNDED: frozenset[Any] = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.einsum.default,
        aten.embedding.default,
        aten.conv2d.default,
        aten.layer_norm.default,
        aten.sigmoid.default,
        aten.tanh.default,
    }
)
