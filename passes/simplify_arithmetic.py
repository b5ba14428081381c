"""--x -> x; x + -y -> x - y; x ** 2 -> x * x; x / 8 -> x * 0.125; x / sqrt(y) -> x * rsqrt(y), and the like.

What changes a number is left alone: ``x * 0`` is NaN where x is not finite; ``0 - x`` and ``-x`` are zeros of
different sign; ``(x + a) - a`` may be there to round; ``x / 3`` is not ``x * (1 / 3)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, users_outside
from graphopt.ir.pattern import Match, argument, arguments
from graphopt.passes._ranges import as_uniform

aten = torch.ops.aten

_NEGATIONS = (aten.neg.default, aten.negative.default)


class Simpler(NamedTuple):
    """What computes the same: an op with its arguments, or a value that is there already (no op)."""

    inner: tuple[fx.Node, ...]  # what is computed on the way and falls away, if nobody else reads it
    target: Any
    args: tuple[Any, ...]


Rule = Callable[[Graph, fx.Node], Simpler | None]


def pattern(graph: Graph) -> Iterator[Match]:
    """Every call that a rule below knows a simpler form of."""
    for node in graph.calls:
        if node._erased or node.target not in _RULES or not _is_tensor(node):
            continue
        for rule in _RULES[node.target]:
            found = rule(graph, node)
            if found is not None:
                yield Match(graph, node, (*sorted(found.inner), node), {"simpler": found})
                break


def check(match: Match) -> str | None:
    """The values on the way must fall away, and no factor may undo what another did."""
    for node in match["simpler"].inner:
        reader = next(users_outside(node, match.nodes), None)
        if reader is not None and match["simpler"].target is not None:
            return f"{node.name} is also read by {reader.name}"
    factors = [_factor(match.graph, node) for node in match.nodes]
    if len(factors) == 2 and None not in factors:
        sizes = [abs(factor[1]) for factor in factors if factor is not None]
        if min(sizes) < 1 < max(sizes):
            return "one factor enlarges, the other shrinks: what overflows between them would not"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Compute the simpler form."""
    rewriter.replace(match.root, _built(rewriter, match["simpler"]))


def _built(rewriter: Rewriter, value: Any) -> Any:
    if not isinstance(value, Simpler):
        return value
    args = [_built(rewriter, arg) for arg in value.args]
    return args[0] if value.target is None else rewriter.call(value.target, *args)


def _double_negation(graph: Graph, node: fx.Node) -> Simpler | None:
    inner: Any = node.args[0]
    return Simpler((inner,), None, inner.args[:1]) if inner.target in _NEGATIONS else None


def _added_negation(graph: Graph, node: fx.Node) -> Simpler | None:
    """x + -y, -x + y, x - -y."""
    left, right = node.args[:2]
    is_sum = node.target is aten.add.Tensor
    if argument(node, "alpha") != 1:
        return None
    if isinstance(right, fx.Node) and right.target in _NEGATIONS:
        target = aten.sub.Tensor if is_sum else aten.add.Tensor
        return Simpler((right,), target, (left, right.args[0]))
    if is_sum and isinstance(left, fx.Node) and left.target in _NEGATIONS and isinstance(right, fx.Node):
        return Simpler((left,), aten.sub.Tensor, (right, left.args[0]))
    return None


def _times_minus_one(graph: Graph, node: fx.Node) -> Simpler | None:
    found = _factor(graph, node)
    return Simpler((), aten.neg.default, found[:1]) if found is not None and found[1] == -1 else None


def _power(graph: Graph, node: fx.Node) -> Simpler | None:
    """Exponents that have an op of their own; torch's pow computes these the same way."""
    x: Any = node.args[0]
    exponent = as_uniform(graph, node.args[1])
    if exponent is None or not _keeps(node, x) or not x.meta["val"].is_floating_point():
        return None
    if exponent == 1:
        return Simpler((), None, (x,))
    if exponent == 2:
        return Simpler((), aten.mul.Tensor, (x, x))
    op = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default, -1: aten.reciprocal.default}.get(exponent)
    return None if op is None else Simpler((), op, (x,))


def _divided_by_a_power_of_two(graph: Graph, node: fx.Node) -> Simpler | None:
    found = _factor(graph, node)
    if found is None or abs(math.frexp(found[1])[0]) != 0.5:
        return None
    return Simpler((), aten.mul.Tensor, found)


def _divided_by_a_root(graph: Graph, node: fx.Node) -> Simpler | None:
    x, root = node.args[:2]
    if not _is_tensor(x) or not isinstance(root, fx.Node) or root.target is not aten.sqrt.default:
        return None
    if not _keeps_type(node, root):
        return None
    return Simpler((root,), aten.mul.Tensor, (x, Simpler((), aten.rsqrt.default, root.args[:1])))


def _times_a_reciprocal(graph: Graph, node: fx.Node) -> Simpler | None:
    for this, other in (node.args[:2], node.args[1::-1]):
        is_reciprocal = isinstance(other, fx.Node) and other.target is aten.reciprocal.default
        if is_reciprocal and _is_tensor(this) and _keeps_type(node, other):  # type: ignore[arg-type]
            return Simpler((other,), aten.div.Tensor, (this, other.args[0]))  # type: ignore[arg-type, union-attr]
    return None


def _reciprocal_of_a_root(graph: Graph, node: fx.Node) -> Simpler | None:
    root: Any = node.args[0]
    return Simpler((root,), aten.rsqrt.default, root.args[:1]) if root.target is aten.sqrt.default else None


def _factor_of_a_factor(graph: Graph, node: fx.Node) -> Simpler | None:
    outer = _factor(graph, node)
    inner = None if outer is None else _factor(graph, outer[0])
    if outer is None or inner is None or not node.meta["val"].is_floating_point():
        return None
    return Simpler((outer[0],), aten.mul.Tensor, (inner[0], inner[1] * outer[1]))


def _factor(graph: Graph, node: Any) -> tuple[fx.Node, float] | None:
    """The value and the number that it is multiplied with, a division by a number included, or None."""
    if not isinstance(node, fx.Node) or node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    orders = [node.args[:2], node.args[1::-1]] if node.target is aten.mul.Tensor else [node.args[:2]]
    for x, other in orders:
        number = as_uniform(graph, other)
        if number is None or isinstance(number, bool) or not math.isfinite(number) or not _keeps(node, x):
            continue
        if node.target is aten.mul.Tensor:
            return x, number  # type: ignore[return-value]
        info = torch.finfo(node.meta["val"].dtype)
        if info.tiny <= abs(number) <= 1 / info.tiny:  # its reciprocal is a normal number
            return x, 1 / number  # type: ignore[return-value]
    return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _keeps_type(node: fx.Node, source: fx.Node) -> bool:
    """True when no operand is cast: the operation is done in the type of the result."""
    sources = [source, *(value for value, _ in arguments(node).values() if _is_tensor(value))]
    return {value.meta["val"].dtype for value in sources} == {node.meta["val"].dtype}


def _keeps(node: fx.Node, source: Any) -> bool:
    if not _is_tensor(source):
        return False
    before, after = source.meta["val"], node.meta["val"]
    return before.dtype == after.dtype and same_shape(before.shape, after.shape)


_RULES: dict[Any, tuple[Rule, ...]] = {
    **dict.fromkeys(_NEGATIONS, (_double_negation,)),
    aten.add.Tensor: (_added_negation,),
    aten.sub.Tensor: (_added_negation,),
    aten.mul.Tensor: (_times_minus_one, _factor_of_a_factor, _times_a_reciprocal),
    aten.div.Tensor: (_divided_by_a_power_of_two, _factor_of_a_factor, _divided_by_a_root),
    aten.pow.Tensor_Scalar: (_power,),
    aten.pow.Tensor_Tensor: (_power,),
    aten.reciprocal.default: (_reciprocal_of_a_root,),
}

PASS = register(Pass("simplify_arithmetic", "prune", pattern, rewrite, check))
