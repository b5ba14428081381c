"""One attention spelled as two products and a softmax: its operands, their axes, its batch and heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import argument, describe
from graphopt.passes._heads import before_join, unrepeated
from graphopt.passes._products import REPEATED, Operand, Product, behind_transposes, fresh
from graphopt.passes._ranges import as_uniform
from graphopt.passes._scores import NotAttentionError, Scores, Term, carry, trace

aten = torch.ops.aten

JOINED = "batch and heads"  # the name of an axis that is both

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Attention:
    """Attention as it is spelled out.

    Args:
        scores: everything between the two products.
        query: the queries, before they are scaled and transposed.
        key: the keys, likewise.
        value: the values, likewise.
        scale: the factor of the scores, those of queries and keys included.
        root: the last node.
        axes: the names of the root's axes.
        nodes: everything that is replaced, in order.
        arranged: those of them that only transpose, view or scale an operand; others may read them too.
        batch: names and sizes of the axes that make up the batch.
        heads: those that make up the heads; the trailing ones may share a key.
    """

    scores: Scores
    query: Operand
    key: Operand
    value: Operand
    scale: float
    root: fx.Node
    axes: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    arranged: frozenset[fx.Node]
    batch: Sizes
    heads: Sizes

    @property
    def factors(self) -> Sizes:
        """The axes of batch and heads."""
        return {**self.batch, **self.heads}

    @property
    def operands(self) -> dict[str, Operand]:
        """Queries, keys and values by name."""
        return {"query": self.query, "key": self.key, "value": self.value}

    @property
    def feature(self) -> str:
        """The name of the values' features."""
        (name,) = (
            n for n in self.value.axes if n not in {*self.factors, JOINED, REPEATED, self.scores.column}
        )
        return name

    def missing(self, operand: Operand) -> list[str]:
        """The axes that an operand must be repeated along: all but those of heads that share a key."""
        if JOINED in operand.axes:
            return []
        kept = self.key.axes + self.value.axes
        needed = list(self.factors) if operand is self.query else [n for n in self.factors if n in kept]
        needed += [] if operand is self.query else [n for n in self.batch if n not in needed]
        return [name for name in needed if name not in operand.axes]


def as_attention(graph: Graph, softmax: fx.Node) -> Attention:
    """The attention that a softmax is the middle of.

    Raises:
        NotAttentionError: it is none; the first node at which it stops being one.
    """
    column = argument(softmax, "dim") % softmax.meta["val"].dim()
    scores, product = carry(graph, trace(graph, softmax.args[0], column), softmax)
    names, values = _second(scores, product)
    sides = scores.product.left, scores.product.right
    sides = sides[::-1] if scores.column in sides[0].axes else sides  # queries, keys
    (query, of_query), (key, of_key), (value, of_value) = (_bare(graph, x) for x in (*sides, values))
    if of_value != 1:
        value = values
    factors = _factors(scores, (query, key, value))
    root, axes = _root(product, tuple(names.get(n, f"value {n}") for n in product.axes), scores, factors)
    first, last = scores.leads[0], scores.leads[-1]
    found = []
    for operand, lead in ((query, first), (key, first), (value, last)):
        found.append(_in_factors(operand, lead, factors))
    (query, again_query), (key, again_key) = (_bare(graph, x) for x in found[:2])
    value = behind_transposes(found[2])
    batch, heads = _batch_and_heads(factors, {*key.axes, *value.axes})
    scale = scores.scale * of_query * of_key * again_query * again_key
    arranged: set[fx.Node] = set()
    for last, operand in zip((*sides, values), (query, key, value), strict=True):
        arranged.update(_between(graph, last.node, unrepeated(operand.node)))
    nodes = tuple(sorted({*scores.nodes, product.node, root, *arranged}))
    return Attention(scores, query, key, value, scale, root, axes, nodes, frozenset(arranged), batch, heads)


def _between(graph: Graph, last: fx.Node, first: fx.Node) -> list[fx.Node]:
    """The transposes, views and scales from one value to another, the first one left out."""
    found = []
    while last is not first:
        found.append(last)
        scaled = _scaled(graph, last)
        source: Any = last.args[0] if scaled is None else scaled[0]
        last = source
    return found


def _second(scores: Scores, product: Product) -> tuple[dict[str, str], Operand]:
    """The second product's names of axes as the scores have them, and the values named so."""
    weights = scores.nodes[-1]
    if product.added is not None or product.factor != 1:
        raise NotAttentionError(f"{describe(product.node)} adds to what is attended to")
    mine, other = (product.left, product.right)[:: 1 if product.left.node is weights else -1]
    names = dict(zip(mine.axes, scores.axes, strict=True))
    if REPEATED in mine.axes or mine.node is other.node:
        raise NotAttentionError(f"{describe(product.node)} repeats the probabilities")
    if names[product.summed] != scores.column:
        raise NotAttentionError(f"the softmax does not run along the axis that {describe(product.node)} sums")
    values = Operand(
        other.node, tuple(names.get(n, n if n == REPEATED else f"value {n}") for n in other.axes)
    )
    features = [name for name in values.axes if name.startswith("value ")]
    if len(features) != 1 or scores.query in values.axes:
        raise NotAttentionError(f"{describe(product.node)} has no axis of features alone")
    return names, values


def _bare(graph: Graph, operand: Operand) -> tuple[Operand, float]:
    """The operand behind transposes and scales, and the product of the scales."""
    factor = 1.0
    while True:
        operand = behind_transposes(operand)
        scaled = _scaled(graph, operand.node)
        if scaled is None:
            break
        source, by = scaled
        factor, operand = factor * by, replace(operand, node=source)
    if operand.view is not None:
        return operand, factor
    view: Any = operand.node
    scaled = _scaled(graph, view.args[0]) if view.target is aten.reshape.default else None
    if scaled is not None:
        return Operand(scaled[0], operand.axes, view), factor * scaled[1]
    return operand, factor


def _scaled(graph: Graph, node: Any) -> tuple[fx.Node, float] | None:
    """What a node multiplies by one number above zero, and that number."""
    if not isinstance(node, fx.Node) or node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    pairs = [(node.args[0], node.args[1])]
    if node.target is aten.mul.Tensor:
        pairs.append((node.args[1], node.args[0]))
    for source, other in pairs:
        number = as_uniform(graph, other)
        if number is None or not isinstance(source, fx.Node) or not number > 0:
            continue
        before, after = source.meta["val"], node.meta["val"]
        if before.dtype == after.dtype and same_shape(before.shape, after.shape):
            return source, float(1 / number if node.target is aten.div.Tensor else number)
    return None


def _factors(scores: Scores, operands: tuple[Operand, ...]) -> Sizes:
    """The axes of batch and heads, where the graph tells them apart; else the one there is."""
    for lead in scores.leads:
        if len(lead) >= 2:
            return lead
    lead = scores.leads[0]
    for operand in operands if lead else ():
        (name,) = lead
        if name in operand.axes:
            parts = _joined_from(operand.node, operand.axes.index(name))
            if parts is not None:
                return dict(zip(fresh(2), parts, strict=True))
    return lead


def _joined_from(node: fx.Node, at: int) -> list[Any] | None:
    """The two sizes, the second one fixed, that a reshape joins at one place."""
    source: Any = node.args[0] if node.target is aten.reshape.default else None
    if not isinstance(source, fx.Node) or source.meta["val"].dim() != node.meta["val"].dim() + 1:
        return None
    sizes = list(source.meta["val"].shape[at : at + 2])
    return sizes if isinstance(sizes[1], int) and before_join(node, at, sizes) is not None else None


def _in_factors(operand: Operand, lead: Sizes, factors: Sizes) -> Operand:
    """The operand with its batch axes named as the factors are; JOINED where they are one."""
    if list(lead) == list(factors):
        return operand
    if same_shape(list(lead.values()), list(factors.values())):
        renamed = dict(zip(lead, factors, strict=True))
        return replace(operand, axes=tuple(renamed.get(n, n) for n in operand.axes))
    if len(lead) != 1 or len(factors) != 2:
        raise NotAttentionError("batch and heads are joined in one product and not in the other")
    (name,) = lead
    if name not in operand.axes:
        return operand
    at = operand.axes.index(name)
    source = before_join(operand.view or operand.node, at, list(factors.values()))
    names = (JOINED,) if source is None else tuple(factors)
    axes = (*operand.axes[:at], *names, *operand.axes[at + 1 :])
    if source is None:
        return replace(operand, axes=axes)
    return Operand(source if operand.view is None else operand.node, axes)  # a scale keeps the shape


def _root(
    product: Product, axes: tuple[str, ...], scores: Scores, factors: Sizes
) -> tuple[fx.Node, tuple[str, ...]]:
    """The last node, and its axes: a reshape that tells batch and heads apart again belongs to it."""
    node, lead = product.node, scores.leads[-1]
    if list(lead) == list(factors):
        return node, axes
    if same_shape(list(lead.values()), list(factors.values())):
        renamed = dict(zip(lead, factors, strict=True))
        return node, tuple(renamed.get(n, n) for n in axes)
    if len(lead) != 1:
        raise NotAttentionError("batch and heads are joined in one product and not in the other")
    at = next(i for i, name in enumerate(axes) if name in lead)
    apart = (*axes[:at], *factors, *axes[at + 1 :])
    shape = list(node.meta["val"].shape)
    wanted = [*shape[:at], *factors.values(), *shape[at + 1 :]]
    if len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.reshape.default and same_shape(user.meta["val"].shape, wanted):
            return user, apart
    return node, (*axes[:at], JOINED, *axes[at + 1 :])


def _batch_and_heads(factors: Sizes, of_keys: set[str]) -> tuple[Sizes, Sizes]:
    """Trailing axes that no key has are heads which share one; the last other one counts the keys' heads."""
    names = list(factors)
    shared = len(names)
    while shared and names[shared - 1] not in of_keys and JOINED not in of_keys:
        shared -= 1
    first = min(shared, max(1, shared - 1))
    return {n: factors[n] for n in names[:first]}, {n: factors[n] for n in names[first:]}


def placed(term: Term, found: Attention) -> tuple[Operand, list[list[str]]]:
    """A term, with the axes that make up (B, H, S, T) for it.

    Raises:
        NotAttentionError: it applies where batch and heads are arranged otherwise.
    """
    scores, factors = found.scores, found.factors
    groups = [list(found.batch), list(found.heads), [scores.query], [scores.column]]
    sizes = next(lead for lead in scores.leads if tuple(lead) == term.lead)
    operand = Operand(term.node, term.axes)
    if len(sizes) <= len(factors):
        return _in_factors(operand, sizes, factors), groups
    finer = len(sizes) - len(factors) + 1  # the first axes together are the first factor
    first, *others = factors.values()
    product: Any = 1
    for size in list(sizes.values())[:finer]:
        product = product * size
    if not same_size(product, first) or not same_shape(list(sizes.values())[finer:], others):
        raise NotAttentionError(f"{describe(term.node)} applies to another arrangement of batch and heads")
    names = list(sizes)
    merged = {
        next(iter(factors)): names[:finer],
        **{f: [n] for f, n in zip(list(factors)[1:], names[finer:], strict=True)},
    }
    return operand, [[n for f in group for n in merged[f]] for group in groups[:2]] + groups[2:]
