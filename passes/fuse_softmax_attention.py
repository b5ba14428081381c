"""softmax(q @ k^T * scale + mask) @ v, however it is spelled -> attention(q, k, v, mask), tokens first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, shared_inside
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._attention import JOINED, Attention, as_attention, placed
from graphopt.passes._heads import expanded, grouped, permuted, size, split, unrepeated
from graphopt.passes._masks import combined, recipe
from graphopt.passes._products import REPEATED, Operand
from graphopt.passes._scores import NotAttentionError, Term, feeds_product

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every softmax whose result feeds a product; what is no attention comes with the reason."""
    for softmax in graph.fx.find_nodes(op="call_function", target=aten.softmax.int):
        if softmax._erased or not feeds_product(softmax):
            continue
        try:
            found = as_attention(graph, softmax)
        except NotAttentionError as reason:
            yield Match(graph, softmax, (softmax,), {"reason": str(reason)})
            continue
        yield Match(graph, found.root, found.nodes, {"attention": found})


def check(match: Match) -> str | None:
    """Nothing else may read what is inside; types, heads and masks must be those of the op."""
    reason: str | None = match.get("reason")
    if reason:
        return reason
    found: Attention = match["attention"]
    shared = shared_inside(match, found.arranged)
    if shared:
        return f"{shared[0].name} is also read by {shared[1].name}"
    dtype = found.root.meta["val"].dtype
    for name, operand in {"query": found.query, "key": found.key, "value": found.value}.items():
        if operand.node.meta["val"].dtype != dtype:
            return f"the {name} is {operand.node.meta['val'].dtype}, but the result {dtype}"
    return _refuse_heads(found) or _refuse_masks(match.graph, found)


def _refuse_heads(found: Attention) -> str | None:
    """The op wants a fixed number of heads, one batch size, and a scale above zero."""
    if any(not isinstance(size, int) for size in found.heads.values()):
        return "the number of heads is dynamic"
    for name, operand in found.operands.items():
        if any(not isinstance(found.factors[axis], int) for axis in found.missing(operand)):
            return f"the {name} is repeated along a dynamic dimension"
    return None


def _refuse_masks(graph: Graph, found: Attention) -> str | None:
    """Masks and biases must make one mask of the queries' type."""
    dtype = found.root.meta["val"].dtype
    scores = found.scores
    try:
        recipe(graph, scores.terms, dtype)
        for term in (*scores.terms, *scores.divisors, *scores.multipliers):
            operand, groups = placed(term, found)
            for axis in [name for group in groups for name in _partly(operand, group)]:
                if not isinstance(_sizes(found, term)[axis], int):
                    return f"the mask {term.node.name} is repeated along a dynamic dimension"
            given = term.node.meta["val"].dtype
            if term.fill is None and given.is_floating_point and given != dtype:
                return f"the mask {term.node.name} is {given}, not {dtype}"
    except NotAttentionError as reason:
        return str(reason)
    return None


def _partly(operand: Operand, group: list[str]) -> list[str]:
    """The axes of a group that the operand lacks, where it has others of that group."""
    missing = [name for name in group if name not in operand.axes]
    return missing if len(missing) < len(group) else []


def _sizes(found: Attention, term: Term) -> dict[str, Any]:
    """The sizes of batch and heads, as they are arranged where a term applies too."""
    return {**next(lead for lead in found.scores.leads if tuple(lead) == term.lead), **found.factors}


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Arrange queries, keys, values and mask, attend, and arrange the result as the second product did."""
    found: Attention = match["attention"]
    dtype = found.root.meta["val"].dtype
    scores = found.scores
    key, value = _unrepeated(found, found.key), _unrepeated(found, found.value)
    if _heads(found, key) != _heads(found, value):
        key, value = found.key, found.value
    query_BSHD = _arranged(rewriter, found, found.query, scores.query, scores.product.summed)
    for target, terms in ((aten.mul.Tensor, scores.multipliers), (aten.div.Tensor, scores.divisors)):
        for term in terms:
            query_BSHD = rewriter.call(target, query_BSHD, _temperature(rewriter, found, term))
    key_BTKD = _arranged(rewriter, found, key, scores.column, scores.product.summed)
    value_BTKE = _arranged(rewriter, found, value, scores.column, found.feature)
    made = recipe(match.graph, scores.terms, dtype)
    mask = combined(rewriter, scores.terms, made, dtype, lambda term: _mask(rewriter, found, term))
    options = {"softcap": scores.softcap, "fill": made.fill}
    attended = rewriter.call(
        ATTENTION.overload,
        query_BSHD,
        key_BTKD,
        value_BTKE,
        mask,
        False,
        _scale(found.scale, query_BSHD),
        **{name: option for name, option in options.items() if option is not None},
    )
    rewriter.replace(match.root, _result(rewriter, found, attended))


def _scale(scale: float, query_BSHD: fx.Node) -> float | None:
    """The op's argument: None for 1 / sqrt(D)."""
    features = query_BSHD.meta["val"].shape[-1]
    usual = isinstance(features, int) and math.isclose(scale, features**-0.5, rel_tol=1e-12)
    return None if usual else scale


def _unrepeated(found: Attention, operand: Operand) -> Operand:
    """Keys or values with as many heads as there were before they were repeated, for (B, H, T, D)."""
    plain = operand.view is None and operand.axes[:2] == tuple(found.factors)
    if plain and operand.axes[2] == found.scores.column:
        return replace(operand, node=unrepeated(operand.node))
    return operand


def _heads(found: Attention, operand: Operand) -> Any:
    """How many heads keys or values have, where they are one axis."""
    arranged = operand.view or operand.node
    shape = dict(zip(operand.axes, arranged.meta["val"].shape, strict=True))
    return [shape.get(name) for name in found.heads]


def _arranged(rewriter: Rewriter, found: Attention, operand: Operand, tokens: str, feature: str) -> fx.Node:
    """An operand as (B, tokens, heads, features)."""
    if operand.view is not None:
        view = rewriter.call(aten.reshape.default, operand.node, *operand.view.args[1:])
        operand = Operand(view, operand.axes)
    if JOINED in operand.axes:
        operand = split(rewriter, operand, JOINED, found.factors)
    operand = expanded(rewriter, operand, found.missing(operand), found.factors)
    return grouped(rewriter, operand, [list(found.batch), [tokens], list(found.heads), [feature]])


def _mask(rewriter: Rewriter, found: Attention, term: Term) -> fx.Node:
    """A mask or bias, broadcastable to (B, H, S, T)."""
    operand, groups = placed(term, found)
    if JOINED in operand.axes:
        operand = split(rewriter, operand, JOINED, found.factors)
    names = [group[0] if len(group) == 1 else REPEATED for group in groups][4 - len(operand.axes) :]
    if len(names) == len(operand.axes) and all(
        axis in (name, REPEATED) for axis, name in zip(operand.axes, names, strict=True)
    ):
        return operand.node
    for group in groups:
        operand = expanded(rewriter, operand, _partly(operand, group), _sizes(found, term))
    return grouped(rewriter, operand, groups)


def _temperature(rewriter: Rewriter, found: Attention, term: Term) -> fx.Node:
    """What scales the scores of a query, broadcastable to (B, S, H, D)."""
    operand, (batch, heads, query, column) = placed(term, found)
    if JOINED in operand.axes:
        operand = split(rewriter, operand, JOINED, found.factors)
    for group in (batch, heads):
        operand = expanded(rewriter, operand, _partly(operand, group), _sizes(found, term))
    return grouped(rewriter, operand, [batch, query, heads, column])


def _result(rewriter: Rewriter, found: Attention, attended: fx.Node) -> fx.Node:
    """(B, S, H, E) with the axes of the root."""
    groups = [list(found.batch), [found.scores.query], list(found.heads), [found.feature]]
    if any(len(group) > 1 for group in groups):
        sizes: list[Any] = []
        for dim, group in enumerate(groups):
            known = [
                found.factors[n] if isinstance(found.factors[n], int) else -1
                for n in group
                if n in found.factors
            ]
            sizes += known if len(group) > 1 else [size(rewriter, attended, dim) for _ in group]
        attended = rewriter.call(aten.reshape.default, attended, sizes)
    else:
        for dim in reversed([i for i, group in enumerate(groups) if not group]):
            attended = rewriter.call(aten.squeeze.dim, attended, dim)
    axes = [name for group in groups for name in group]
    apart = [n for name in found.axes for n in (found.factors if name == JOINED else [name])]
    result = permuted(rewriter, attended, [axes.index(name) for name in apart])
    if JOINED not in found.axes:
        return result
    sizes = [size(rewriter, result, dim) for dim in range(len(apart))]
    at = found.axes.index(JOINED)
    together = sizes[at] * sizes[at + 1] if isinstance(sizes[at], int) else -1
    return rewriter.call(aten.reshape.default, result, [*sizes[:at], together, *sizes[at + 2 :]])


PASS = register(Pass("fuse_softmax_attention", "fuse", pattern, rewrite, check))
