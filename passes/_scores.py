"""What happens to a product of queries and keys until it is a softmax: scale, cap, masks, biases, layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import argument, describe
from graphopt.passes._permutations import permutation
from graphopt.passes._products import Product, as_product, fresh
from graphopt.passes._ranges import as_uniform

aten = torch.ops.aten
_BUDGET = 64  # nodes looked at behind one softmax: no model does more to its scores


@dataclass(frozen=True)
class Term:
    """A mask or a bias on its way to the softmax.

    Args:
        node: what is added, or where (True) the fill replaces the score.
        axes: the names of its axes; those of size 1 that are repeated have no part in them.
        lead: the batch axes of the scores where it applies, in order.
        factor: what the added values are multiplied by.
        fill: what the score is replaced by; None for what is added.
        keeps: the condition says where to keep the score instead.
    """

    node: fx.Node
    axes: tuple[str, ...]
    lead: tuple[str, ...]
    factor: float = 1.0
    fill: float | None = None
    keeps: bool = False


@dataclass(frozen=True)
class Scores:
    """The input of a softmax, traced back to a product.

    Args:
        product: the product.
        nodes: everything from the product to the last node, in order.
        query: the name of the axis of queries.
        column: the name of the axis of keys, which the softmax runs along.
        axes: the names of the last node's axes.
        leads: the batch axes by name and size, before and after each reshape; the last is the current one.
        scale: what the product is multiplied by.
        softcap: the bound that a hyperbolic tangent gives it, None without one.
        terms: masks and biases in the order in which they apply.
        divisors: tensors that the product is divided by, the same for every key.
        multipliers: tensors that it is multiplied by, likewise.
    """

    product: Product
    nodes: tuple[fx.Node, ...]
    query: str
    column: str
    axes: tuple[str, ...]
    leads: tuple[dict[str, Any], ...]
    scale: float
    softcap: float | None = None
    terms: tuple[Term, ...] = ()
    divisors: tuple[Term, ...] = ()
    multipliers: tuple[Term, ...] = ()

    @property
    def lead(self) -> tuple[str, ...]:
        """The batch axes of the last node, in order."""
        return tuple(name for name in self.axes if name in self.leads[-1])


class NotAttentionError(Exception):
    """Why a value is no scores of attention, and at which node."""


def trace(graph: Graph, node: Any, column: int) -> Scores:
    """The scores that a node holds.

    Args:
        graph: the graph.
        node: the input of a softmax.
        column: the axis that the softmax runs along, from 0.

    Raises:
        NotAttentionError: the first node at which it stops being scores, and what was expected.
    """
    path: list[fx.Node] = []
    stopped: list[fx.Node] = []
    found = next(_paths(graph, node, path, stopped, itertools.count()), None)
    if found is None:
        at = describe(stopped[0]) if stopped else "its input"
        raise NotAttentionError(f"{at} is no product of queries and keys, nor a scale, mask or cap of one")
    product, steps = found
    scores = _start(product, column_name(product, [*steps], column))
    for step in steps:
        scores = _after(graph, scores, step)
    return scores


def column_name(product: Product, steps: list[fx.Node], column: int) -> str:
    """The name, at the product, of the axis that the softmax runs along."""
    for step in reversed(steps):
        order = permutation(step)
        if order is not None:
            column = order[column]
        elif step.target is aten.reshape.default:
            rank, source = step.meta["val"].dim(), step.args[0].meta["val"]  # type: ignore[union-attr]
            column = column - rank + source.dim()
            if column < 0:
                raise NotAttentionError(f"{describe(step)} moves the axis that the softmax runs along")
    return product.axes[column]


def _paths(
    graph: Graph, node: Any, path: list[fx.Node], stopped: list[fx.Node], budget: Iterator[int]
) -> Iterator[tuple[Product, list[fx.Node]]]:
    """Every way back from a node to a product, the steps in forward order."""
    if not isinstance(node, fx.Node) or next(budget) > _BUDGET:
        return
    product = as_product(node)
    if product is not None:
        yield product, list(reversed(path))
        return
    sources = _sources(graph, node)
    if not sources and not stopped:
        stopped.append(node)
    for source in sources:
        path.append(node)
        yield from _paths(graph, source, path, stopped, budget)
        path.pop()


def _sources(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """The arguments of a call that may be the scores it changes."""
    if node.op != "call_function" or node.target not in _STEPS:
        return []
    if node.target in _WHERES:
        candidates = [argument(node, "self"), argument(node, "other")]
    elif node.target in (aten.add.Tensor, aten.mul.Tensor):
        candidates = list(node.args[:2])
    else:
        candidates = [node.args[0]]
    tensors = [
        c for c in candidates if isinstance(c, fx.Node) and isinstance(c.meta.get("val"), torch.Tensor)
    ]
    if node.target in _LAYOUTS:
        return tensors
    shape = node.meta["val"].shape
    return [c for c in tensors if same_shape(c.meta["val"].shape, shape) and as_uniform(graph, c) is None]


def _start(product: Product, column: str) -> Scores:
    left, right = product.left.axes, product.right.axes
    if (column in left) == (column in right):
        raise NotAttentionError(f"the softmax does not run along the keys of {describe(product.node)}")
    query, key = (right, left) if column in left else (left, right)
    rows = [name for name in product.axes if name in query and name not in key]
    if not rows:
        raise NotAttentionError(f"{describe(product.node)} has no axis of queries alone")
    row = rows[-1]  # the others are heads that share one key
    shape = dict(zip(product.axes, product.node.meta["val"].shape, strict=True))
    lead = {name: size for name, size in shape.items() if name not in (row, column)}
    scores = Scores(product, (product.node,), row, column, product.axes, (lead,), product.factor)
    if product.added is None:
        return scores
    return replace(scores, terms=(_term(scores, product.added[0], factor=product.added[1]),))


def _term(scores: Scores, node: fx.Node, **options: Any) -> Term:
    shape = node.meta["val"].shape
    names = scores.axes[len(scores.axes) - len(shape) :]
    axes = tuple("" if same_size(size, 1) else name for name, size in zip(names, shape, strict=True))
    return Term(node, axes, scores.lead, **options)


def _after(graph: Graph, scores: Scores, step: fx.Node) -> Scores:
    """The scores after one more step."""
    scores = replace(scores, nodes=(*scores.nodes, step))
    changed = _STEPS[step.target](graph, scores, step)
    if isinstance(changed, str):
        raise NotAttentionError(changed)
    return changed


def _same(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    if not step.meta["val"].dtype.is_floating_point:
        return f"{describe(step)} makes {step.meta['val'].dtype} of the scores"
    return scores


def _other(scores: Scores, step: fx.Node) -> Any:
    """The operand that is not the scores."""
    before = scores.nodes[-2]
    return step.args[1] if step.args[0] is before else step.args[0]


def _multiplied(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    if step.args[0] is step.args[1]:
        return f"{describe(step)} squares the scores"
    factor = as_uniform(graph, _other(scores, step))
    if factor is None:
        return _scaled_by_tensor(scores, step)
    if step.target is aten.div.Tensor:
        factor = 1 / factor if factor else 0
    if not factor > 0:
        return f"{describe(step)} multiplies the scores by {factor}, which is not above zero"
    terms = tuple(
        replace(term, factor=term.factor * factor, fill=None if term.fill is None else term.fill * factor)
        for term in scores.terms
    )
    cap = None if scores.softcap is None else scores.softcap * factor
    return replace(scores, scale=scores.scale * factor, softcap=cap, terms=terms)


def _scaled_by_tensor(scores: Scores, step: fx.Node) -> Scores | str:
    """A temperature a head, or a query: the same for every key, it may as well scale the queries."""
    other = _other(scores, step)
    divides = step.target is aten.div.Tensor
    if scores.terms or scores.softcap is not None:
        return f"{describe(step)} multiplies scores that are masked or capped already by a tensor"
    term = _term(scores, other)
    if scores.column in term.axes:
        return f"{describe(step)} multiplies the scores by a tensor that differs between keys"
    if divides:
        return replace(scores, divisors=(*scores.divisors, term))
    return replace(scores, multipliers=(*scores.multipliers, term))


def _added(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    other, alpha = _other(scores, step), argument(step, "alpha")
    factor = -alpha if step.target is aten.sub.Tensor else alpha
    if step.args[0] is step.args[1] or (other is step.args[0] and alpha != 1):
        return f"{describe(step)} adds the scores to something else"
    if not isinstance(other, fx.Node):
        return f"{describe(step)} adds {other} to the scores"
    return replace(scores, terms=(*scores.terms, _term(scores, other, factor=float(factor))))


def _masked(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    return _filled(graph, scores, step, argument(step, "mask"), argument(step, "value"), keeps=False)


def _chosen(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    keeps = argument(step, "self") is scores.nodes[-2]
    value = argument(step, "other" if keeps else "self")
    return _filled(graph, scores, step, argument(step, "condition"), value, keeps=keeps)


def _filled(
    graph: Graph, scores: Scores, step: fx.Node, condition: Any, value: Any, *, keeps: bool
) -> Scores | str:
    fill = as_uniform(graph, value)
    if fill is None:
        return f"{describe(step)} replaces scores by values that are not one number"
    # as the scores' type has it: the lowest number of a wider type is -inf
    fill = torch.tensor(float(fill), dtype=torch.float64).to(step.meta["val"].dtype).item()
    return replace(scores, terms=(*scores.terms, _term(scores, condition, fill=float(fill), keeps=keeps)))


def _capped(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    if scores.softcap is not None or scores.terms:
        return f"{describe(step)} caps scores that are masked or capped already"
    return replace(scores, softcap=1.0)


def _permuted(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    order = permutation(step)
    assert order is not None
    return replace(scores, axes=tuple(scores.axes[i] for i in order))


def _reshaped(graph: Graph, scores: Scores, step: fx.Node) -> Scores | str:
    """Batch and heads joined or split, in front of the queries and the keys."""
    before, after = scores.nodes[-2].meta["val"].shape, step.meta["val"].shape
    behind = [name for name in scores.axes if name not in scores.leads[-1]]
    if len(after) < 2 or list(scores.axes[-2:]) != behind or not same_shape(before[-2:], after[-2:]):
        return f"{describe(step)} reshapes more than the batch and the heads"
    if same_shape(before, after):
        return scores
    lead = fresh(len(after) - 2)
    sizes = dict(zip(lead, after, strict=False))
    return replace(scores, axes=(*lead, *behind), leads=(*scores.leads, sizes))


_WHERES = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther)
_LAYOUTS = (aten.reshape.default, aten.transpose.int, aten.permute.default)
_Step = Callable[[Graph, Scores, fx.Node], Scores | str]  # the scores after it, or why they are none
_STEPS: dict[Any, _Step] = {
    aten.to.dtype: _same,
    aten.dropout.default: _same,
    aten.mul.Tensor: _multiplied,
    aten.div.Tensor: _multiplied,
    aten.add.Tensor: _added,
    aten.sub.Tensor: _added,
    aten.masked_fill.Scalar: _masked,
    aten.masked_fill.Tensor: _masked,
    **dict.fromkeys(_WHERES, _chosen),
    aten.tanh.default: _capped,
    aten.reshape.default: _reshaped,
    aten.transpose.int: _permuted,
    aten.permute.default: _permuted,
}


CARRIED = (aten.to.dtype, aten.dropout.default, *_LAYOUTS)  # what leaves the probabilities as they are


def carry(graph: Graph, scores: Scores, softmax: fx.Node) -> tuple[Scores, Product]:
    """The scores carried over the softmax to the second product, whose operand is then the last node.

    Raises:
        NotAttentionError: the weights are changed, or more than one product reads them.
    """
    node = softmax
    scores = replace(scores, nodes=(*scores.nodes, softmax))
    while True:
        readers = list(node.users)
        if len(readers) != 1:
            others = [describe(r) for r in readers if r.op != "output" and as_product(r) is None]
            by = "the caller" if any(r.op == "output" for r in readers) else (others or ["two products"])[0]
            raise NotAttentionError(f"the probabilities are also read by {by}")
        product = as_product(readers[0])
        if product is not None:
            return scores, product
        node = readers[0]
        if node.op != "call_function" or node.target not in CARRIED:
            raise NotAttentionError(f"{describe(node)} changes the probabilities")
        scores = _after(graph, scores, node)


def feeds_product(softmax: fx.Node) -> bool:
    """True when a product reads what a softmax computes, behind casts and views at most."""
    work = list(softmax.users)
    while work:
        node = work.pop()
        if as_product(node) is not None:
            return True
        if node.op == "call_function" and node.target in CARRIED:
            work.extend(node.users)
    return False
