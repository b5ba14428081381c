"""What a value is in terms of one tensor's mean and mean square: norms in any spelling come out the same.

A norm is spelled with powers, products and sums of a few values: the normalised tensor u, centred or not, its
mean, and S, the mean of its square. ``Moments`` computes with these in symbols, node after node, so that
``x * rsqrt(mean(x * x) + eps)`` and ``x / (norm(x) * d ** -0.5)`` are both ``u * (S + eps) ** -0.5``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import argument
from graphopt.passes._ranges import as_uniform
from graphopt.passes._terms import Term, added, negated, power, product

aten = torch.ops.aten


class Moments:
    """The values that derive from one tensor and its moments over some dimensions.

    Args:
        graph: the graph.
        tensor: the tensor that is normalised.
        dims: the dimensions that its moments are taken over, not negative.
    """

    def __init__(self, graph: Graph, tensor: fx.Node, dims: tuple[int, ...]) -> None:
        self.graph = graph
        self.tensor = tensor
        self.dims = dims
        self.shape = tensor.meta["val"].shape
        self.terms: dict[fx.Node, Term | tuple[Term, ...]] = {tensor: Term(rows=1)}
        work = [tensor]
        while work:
            for user in work.pop().users:
                rule = _RULES.get(user.target) if user.op == "call_function" else None
                if rule is None or user in self.terms:
                    continue
                found = rule(self, user)
                if found is not None:
                    self.terms[user] = found
                    work.append(user)

    @property
    def size(self) -> int | None:
        """How many values are averaged; None where that is dynamic."""
        sizes = [self.shape[dim] for dim in self.dims]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None

    def term(self, value: Any) -> Term | None:
        """The term of an argument: a node's, a literal's, a weight's."""
        found = self.terms.get(value) if isinstance(value, fx.Node) else None
        if isinstance(found, Term):
            return found
        literal = self.literal(value)
        if literal is not None:
            return Term(scale=literal)
        return Term(weight=value) if is_vector(self.graph, value, self.tensor, self.dims) else None

    def literal(self, value: Any) -> float | None:
        """The number that an argument is; a constant of one element counts."""
        constant = self.graph.constant(value)
        if constant is not None and (constant.numel() != 1 or not constant.is_floating_point()):
            return None
        number = as_uniform(self.graph, value) if constant is not None else value
        return float(number) if isinstance(number, (int, float)) and not isinstance(number, bool) else None


def is_vector(graph: Graph, node: Any, x: fx.Node, dims: tuple[int, ...]) -> bool:
    """True for a weight: one value a normalised position, the same along all other dimensions."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    shape = x.meta["val"].shape
    if not isinstance(val, torch.Tensor) or not val.is_floating_point() or val.dim() > len(shape):
        return False
    padded = [1] * (len(shape) - val.dim()) + list(val.shape)
    wanted = [size if dim in dims else 1 for dim, size in enumerate(shape)]
    if not same_shape(padded, wanted):
        return False
    return val.dim() < len(shape) or _is_made_of_constants(node)  # else it is another tensor of one row


def _is_made_of_constants(node: fx.Node, levels: int = 4) -> bool:
    """True for a constant behind casts, sums and views."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or not levels or not node.all_input_nodes:
        return False
    return all(_is_made_of_constants(source, levels - 1) for source in node.all_input_nodes)


def dims_of(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions that a reduction goes over, in order and not negative; None when it is another call."""
    rank = node.all_input_nodes[0].meta["val"].dim() if node.all_input_nodes else 0
    if node.target is aten.einsum.default:
        return (rank - 1,) if _is_dot(node) else None
    dims = argument(node, "dim")
    if dims is None:
        dims = range(rank)
    return tuple(sorted(dim % rank for dim in ([dims] if isinstance(dims, int) else dims))) if rank else None


def tensor_behind(node: fx.Node) -> fx.Node:
    """The tensor whose moments a reduction of this node takes: behind squares, centring, widening casts."""
    while node.op == "call_function" and node.all_input_nodes:
        source: Any = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return node
        squared = node.target in (aten.pow.Tensor_Scalar, aten.square.default)
        squared |= node.target is aten.mul.Tensor and node.args[1] is source
        if not squared and not widens(node) and not _is_centring(node):
            return node
        node = source
    return node


def widens(node: fx.Node) -> bool:
    """True for a cast that keeps every value."""
    if node.target not in (aten.to.dtype, aten.type_as.default):
        return False
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    return before.is_floating_point and torch.promote_types(before, after) == after


def _is_centring(node: fx.Node) -> bool:
    if node.target is not aten.sub.Tensor or not isinstance(node.args[1], fx.Node):
        return False
    mean: Any = node.args[1]
    while mean.op == "call_function" and mean.target in _TRANSPARENT:
        mean = mean.args[0]
    if mean.target is operator.getitem:
        mean = mean.args[0]
    over = mean.target in (aten.mean.dim, aten.var_mean.correction, aten.div.Tensor, aten.mul.Tensor)
    return over and tensor_behind(mean.args[0]) is tensor_behind(node.args[0])  # type: ignore[arg-type]


def _is_dot(node: fx.Node) -> bool:
    """einsum of a value with itself, summed over the last dimension: "bsd,bsd->bs"."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, _, output = equation.partition("->")
    left, _, right = inputs.partition(",")
    return left == right and left[:-1] == output and len(operands) == 2 and operands[0] is operands[1]  # type: ignore[arg-type, index]


def _binary(combine: Callable[[Term | None, Term | None], Term | None], inverse: Any = None) -> Any:
    def rule(moments: Moments, node: fx.Node) -> Term | None:
        left, right = (moments.term(value) for value in node.args[:2])
        if node.kwargs or len(node.args) > 2:
            return None
        return combine(left, right if inverse is None else inverse(right))

    return rule


def _raised(exponent: float | None = None) -> Any:
    def rule(moments: Moments, node: fx.Node) -> Term | None:
        by = moments.literal(node.args[1]) if exponent is None else exponent
        return None if by is None else power(moments.term(node.args[0]), by)

    return rule


def _same(moments: Moments, node: fx.Node) -> Term | None:
    return moments.term(node.args[0])


def _moved(moments: Moments, node: fx.Node) -> Term | None:
    """Views: a statistic may get back the dimensions that it lost."""
    term = moments.term(node.args[0])
    if term is None:
        return None
    if node.target is aten.expand.default:
        return term if term.kept else None
    if term.rows or term.weight is not None:
        return term if same_shape(node.meta["val"].shape, moments.shape) else None
    lined_up = [1 if dim in moments.dims else size for dim, size in enumerate(moments.shape)]
    return replace(term, kept=True) if same_shape(node.meta["val"].shape, lined_up) else None


def _bounded(moments: Moments, node: fx.Node) -> Term | None:
    """A bound of 0 says nothing of a variance; a larger one is not an eps that is added."""
    term, bound = moments.term(node.args[0]), moments.literal(node.args[1])
    if term is None or bound is None or not term.is_statistic or len(node.args) > 2:
        return None
    if bound <= 0 and term.power > 0 and term.scale > 0:
        return term
    return replace(term, flaw="the root is bounded from below, where a norm adds eps")


def _reduced(of_rows: Callable[[Moments, fx.Node, Term], Term | None]) -> Any:
    def rule(moments: Moments, node: fx.Node) -> Any:
        term = moments.term(node.all_input_nodes[0])
        if node.target is aten.einsum.default:
            term = power(term, 2)
        same_dims = term is not None and term.rows and dims_of(node) == moments.dims
        if term is None or not same_dims or term.power or term.means or term.weight or not term.kept:
            return None
        kept = node.target is not aten.einsum.default and bool(argument(node, "keepdim"))
        found = of_rows(moments, node, term)
        if isinstance(found, tuple):
            return tuple(replace(item, kept=kept) for item in found)
        return None if found is None else replace(found, kept=kept)

    return rule


def _mean(moments: Moments, node: fx.Node, term: Term) -> Term | None:
    if term.rows == 2:
        return replace(term, rows=0, power=1.0)
    return None if term.centred else replace(term, rows=0, means=1)


def _total(moments: Moments, node: fx.Node, term: Term) -> Term | None:
    mean, size = _mean(moments, node, term), moments.size
    return None if mean is None or size is None else replace(mean, scale=mean.scale * size)


def _variance(moments: Moments, node: fx.Node, term: Term) -> Term | None:
    if node.target in (aten.var.dim, aten.std.dim):
        correction: Any = int(argument(node, "unbiased"))
    else:
        correction = argument(node, "correction")
        correction = 1 if correction is None else correction
    size = moments.size
    if term.rows != 1 or (correction and (size is None or correction >= size)):
        return None
    unbiased = size / (size - correction) if correction and size is not None else 1.0
    return Term(scale=term.scale**2 * unbiased, power=1.0, centred=True)


def _deviation(moments: Moments, node: fx.Node, term: Term) -> Term | None:
    return power(_variance(moments, node, term), 0.5)


def _variance_and_mean(moments: Moments, node: fx.Node, term: Term) -> Any:
    variance, mean = _variance(moments, node, term), _mean(moments, node, term)
    return None if variance is None or mean is None else (variance, mean)


def _length(moments: Moments, node: fx.Node, term: Term) -> Term | None:
    order = argument(node, "p" if node.target is aten.norm.ScalarOpt_dim else "ord")
    size = moments.size
    if term.rows != 1 or order not in (2, None) or size is None or len(moments.dims) != 1:
        return None
    return Term(scale=abs(term.scale) * size**0.5, power=0.5, centred=term.centred)


def _item(moments: Moments, node: fx.Node) -> Term | None:
    found = moments.terms.get(node.args[0])  # type: ignore[arg-type]
    return found[node.args[1]] if isinstance(found, tuple) else None  # type: ignore[index]


_TRANSPARENT = (aten.to.dtype, aten.type_as.default, aten.expand.default, aten.unsqueeze.default)

REDUCTIONS: dict[Any, Any] = {
    aten.mean.dim: _reduced(_mean),
    aten.sum.dim_IntList: _reduced(_total),
    aten.einsum.default: _reduced(_total),
    aten.var.correction: _reduced(_variance),
    aten.var.dim: _reduced(_variance),
    aten.std.correction: _reduced(_deviation),
    aten.std.dim: _reduced(_deviation),
    aten.var_mean.correction: _reduced(_variance_and_mean),
    aten.linalg_vector_norm.default: _reduced(_length),
    aten.linalg_norm.default: _reduced(_length),
    aten.norm.ScalarOpt_dim: _reduced(_length),
}

_RULES: dict[Any, Callable[[Moments, fx.Node], Any]] = {
    **REDUCTIONS,
    aten.mul.Tensor: _binary(product),
    aten.div.Tensor: _binary(product, lambda term: power(term, -1)),
    aten.add.Tensor: _binary(added),
    aten.sub.Tensor: _binary(added, negated),
    aten.neg.default: lambda moments, node: negated(moments.term(node.args[0])),
    aten.pow.Tensor_Scalar: _raised(),
    aten.square.default: _raised(2),
    aten.sqrt.default: _raised(0.5),
    aten.rsqrt.default: _raised(-0.5),
    aten.reciprocal.default: _raised(-1),
    aten.clamp_min.default: _bounded,
    aten.clamp.default: _bounded,
    aten.maximum.default: _bounded,
    aten.to.dtype: _same,
    aten.type_as.default: _same,
    aten.expand.default: _moved,
    aten.unsqueeze.default: _moved,
    aten.reshape.default: _moved,
    operator.getitem: _item,
}
