"""A product of two tensors, however it is spelled: which of its axes are shared, and which one is summed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import same_size
from graphopt.ir.pattern import argument
from graphopt.passes._permutations import permutation

aten = torch.ops.aten

REPEATED = ""  # the name of an axis of size 1 that the product repeats


@dataclass(frozen=True)
class Operand:
    """A value and the names of its axes.

    Args:
        node: the value.
        axes: the names.
        view: a reshape of the value that gives it these axes, where a scale stood between the two.
    """

    node: fx.Node
    axes: tuple[str, ...]
    view: fx.Node | None = None


@dataclass(frozen=True)
class Product:
    """The sum over one axis of two operands' products.

    Args:
        node: what computes it.
        left: the first operand.
        right: the second one.
        axes: the names of the result's axes.
        summed: the name of the axis that is summed.
        factor: what the sum is multiplied by.
        added: a tensor that is added to it, with its own factor.
    """

    node: fx.Node
    left: Operand
    right: Operand
    axes: tuple[str, ...]
    summed: str
    factor: float = 1.0
    added: tuple[fx.Node, float] | None = None


def as_product(node: Any) -> Product | None:
    """The product that a call computes, or None when it is another call."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matmul(node, node.args[0], node.args[1])
    if node.target is aten.baddbmm.default:
        added: Any = argument(node, "self")
        factors = argument(node, "beta"), argument(node, "alpha")
        if not all(isinstance(factor, (int, float)) for factor in factors):
            return None
        rest = (added, float(factors[0])) if factors[0] else None
        return _matmul(node, argument(node, "batch1"), argument(node, "batch2"), float(factors[1]), rest)
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _matmul(
    node: fx.Node, left: Any, right: Any, factor: float = 1.0, added: tuple[fx.Node, float] | None = None
) -> Product | None:
    ranks = left.meta["val"].dim(), right.meta["val"].dim()
    if min(ranks) < 2:
        return None
    lead = tuple(f"lead{i}" for i in range(max(ranks) - 2))
    axes = (*lead, "row", "column")
    operands = []
    for operand, rank, last in ((left, ranks[0], ("row", "inner")), (right, ranks[1], ("inner", "column"))):
        named = _named(operand, (*lead[len(lead) - rank + 2 :], *last), node, axes)
        if named is None:
            return None
        operands.append(named)
    return Product(node, operands[0], operands[1], axes, "inner", factor, added)


def _einsum(node: fx.Node) -> Product | None:
    equation, tensors = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return None
    given, arrow, result = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if not arrow or "..." in equation:
        return None
    left, right = parts
    if any(len(set(names)) != len(names) for names in (left, right)):
        return None
    summed = [name for name in left if name in right and name not in result]
    alone = [name for name in (*left, *right) if name not in result and name not in summed]
    if len(summed) != 1 or alone:
        return None
    operands = [_named(x, tuple(names), node, tuple(result)) for x, names in zip(tensors, parts, strict=True)]
    if operands[0] is None or operands[1] is None:
        return None
    return Product(node, operands[0], operands[1], tuple(result), summed[0])


def _named(
    operand: fx.Node, names: tuple[str, ...], result: fx.Node, axes: tuple[str, ...]
) -> Operand | None:
    """The operand with its axes named, REPEATED where it has 1 and the result more; None if not known."""
    sizes = dict(zip(axes, result.meta["val"].shape, strict=True))
    found = []
    for name, size in zip(names, operand.meta["val"].shape, strict=True):
        if name not in sizes or same_size(size, sizes[name]):
            found.append(name)
        elif same_size(size, 1):
            found.append(REPEATED)
        else:
            return None
    return Operand(operand, tuple(found))


def behind_transposes(operand: Operand) -> Operand:
    """The operand before its axes were reordered, inserted with size 1, or repeated."""
    while operand.view is None:
        node, axes = operand.node, operand.axes
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        order = permutation(node)
        if order is not None:
            before = dict(zip(order, axes, strict=True))
            operand = Operand(source, tuple(before[i] for i in range(len(axes))))
        elif node.target is aten.unsqueeze.default and axes[_at(node)] == REPEATED:
            operand = Operand(source, tuple(n for i, n in enumerate(axes) if i != _at(node)))
        elif node.target is aten.expand.default:
            sizes = source.meta["val"].shape
            added = len(axes) - len(sizes)
            pairs = zip(axes[added:], sizes, node.meta["val"].shape[added:], strict=True)
            operand = Operand(source, tuple(n if same_size(a, b) else REPEATED for n, a, b in pairs))
        else:
            break
    return operand


def _at(node: fx.Node) -> int:
    at: int = argument(node, "dim") % node.meta["val"].dim()
    return at


_taken = itertools.count()


def fresh(count: int) -> tuple[str, ...]:
    """Names that no axis has."""
    return tuple(f"axis{next(_taken)}" for _ in range(count))
