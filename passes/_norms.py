"""Where a value is normalised, in any spelling, and with which weight, bias and eps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, users_outside
from graphopt.ir.pattern import Match, argument
from graphopt.passes._moments import REDUCTIONS, Moments, dims_of, is_vector, tensor_behind, widens
from graphopt.passes._terms import Term

aten = torch.ops.aten

_ROUNDING = 2e-7  # of a factor that is 1: sqrt(d) * d ** -0.5, kept in float32


def norms(graph: Graph, *, centred: bool) -> Iterator[Match]:
    """Every ``(u / sqrt(mean(u^2) + eps)) * weight + bias`` that is spelled out.

    Args:
        graph: the graph.
        centred: whether u is the tensor less its mean (LayerNorm), or the tensor itself (RMSNorm).

    Returns:
        Matches that bind ``x``, ``dims``, ``eps``, ``scale`` (a literal factor), ``weight``, ``bias``,
        ``centred``, and ``flaw`` and ``shared``: reasons against the match.
    """
    seen: set[tuple[fx.Node, tuple[int, ...]]] = set()
    anchors = [n for op in REDUCTIONS for n in graph.fx.find_nodes(op="call_function", target=op)]
    for anchor in sorted(anchors):
        dims = None if anchor._erased else dims_of(anchor)
        if not dims:
            continue
        tensor = tensor_behind(anchor.all_input_nodes[0])
        if (tensor, dims) in seen or not tensor.meta["val"].is_floating_point():
            continue
        seen.add((tensor, dims))
        yield from _of_tensor(Moments(graph, tensor, dims), centred)


def _of_tensor(moments: Moments, centred: bool) -> Iterator[Match]:
    def is_norm(node: fx.Node) -> bool:
        term = moments.terms.get(node)
        return isinstance(term, Term) and term.is_normalised and term.centred == centred

    graph = moments.graph
    for head in [node for node in moments.terms if is_norm(node)]:
        whole = same_shape(head.meta["val"].shape, moments.shape)
        if whole and not any(is_norm(user) for user in head.users):
            term: Any = moments.terms[head]
            region = _region(moments, head)
            shared = _shared(moments, region)
            yield tailed(graph, moments.tensor, moments.dims, region, term, shared=shared)


def _region(moments: Moments, head: fx.Node) -> list[fx.Node]:
    """What the head is computed from, up to the tensor; weights and literals are not part of it."""
    found, work = {head}, [head]
    while work:
        for source in work.pop().all_input_nodes:
            if source in moments.terms and source is not moments.tensor and source not in found:
                found.add(source)
                work.append(source)
    return sorted(found)


def _shared(moments: Moments, region: list[fx.Node]) -> str | None:
    """A step that something reads which is no norm of the same tensor; a cast of the tensor may be read."""
    for node in region[:-1]:
        term = moments.terms[node]
        if isinstance(term, Term) and term.is_tensor:
            continue
        for user in users_outside(node, region):
            if user not in moments.terms:
                return f"{node.name} is also read by {user.name}"
    return None


def tailed(
    graph: Graph,
    x: fx.Node,
    dims: tuple[int, ...],
    region: list[fx.Node],
    term: Term,
    *,
    bias: Any = None,
    shared: str | None = None,
) -> Match:
    """The match of a norm, grown over the casts, factors, weight and bias behind it."""
    node, nodes, scale, weight = region[-1], list(region), term.scale, term.weight
    while len(node.users) == 1:
        (user,) = node.users
        step = _step(graph, node, user, x, dims)
        if step is None:
            break
        kind, value = step
        if kind == "scale" and bias is None:
            scale *= value
        elif kind == "weight" and weight is None and bias is None:
            weight = value
        elif kind == "bias" and bias is None and term.centred:
            bias = value
        elif kind == "both" and weight is None and bias is None and term.centred:
            weight, bias = value
        elif kind != "cast":
            break
        nodes.append(user)
        node = user
    while widens(node) and node.args[0] in nodes and not _does_nothing(node):  # the readers' business
        nodes.remove(node)
        node = node.args[0]  # type: ignore[assignment]
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=_ROUNDING) else scale
    bound = {"x": x, "dims": dims, "eps": term.eps, "scale": scale}
    bound |= {"weight": unwidened(weight), "bias": unwidened(bias)}
    bound |= {"centred": term.centred, "flaw": term.flaw, "shared": shared}
    return Match(graph, node, tuple(nodes), bound)


def _does_nothing(cast: fx.Node) -> bool:
    source: Any = cast.args[0]
    return bool(source.meta["val"].dtype == cast.meta["val"].dtype)


def unwidened(node: Any) -> Any:
    """A weight as it was before it was cast to the norm's type."""
    while isinstance(node, fx.Node) and node.op == "call_function" and widens(node):
        node = node.args[0]
    return node


def _step(graph: Graph, node: fx.Node, user: fx.Node, x: fx.Node, dims: tuple[int, ...]) -> Any:
    """What the only reader of a normalised value does to it: (kind, value), or None."""
    if user.op != "call_function" or not isinstance(user.meta.get("val"), torch.Tensor):
        return None
    if not same_shape(user.meta["val"].shape, x.meta["val"].shape):
        return None
    if user.target in (aten.to.dtype, aten.type_as.default) and user.args[0] is node:
        return ("cast", None) if user.meta["val"].is_floating_point() else None
    if user.target is aten.addcmul.default:
        bias, *factors = user.args[:3]
        other = [factor for factor in factors if factor is not node]
        fits = len(other) == 1 and bias is not node and argument(user, "value") == 1
        fits = fits and is_vector(graph, other[0], x, dims) and is_vector(graph, bias, x, dims)
        return ("both", (other[0], bias)) if fits else None
    if user.target not in (aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor) or user.kwargs:
        return None
    this, other = user.args[:2]
    if user.target is aten.div.Tensor:
        literal = isinstance(other, (int, float)) and not isinstance(other, bool) and other
        return ("scale", 1.0 / float(other)) if literal else None  # type: ignore[arg-type]
    value = other if this is node else this
    if isinstance(value, (int, float)):
        return ("scale", float(value)) if user.target is aten.mul.Tensor and value else None
    if value is node or not is_vector(graph, value, x, dims):
        return None
    return ("weight" if user.target is aten.mul.Tensor else "bias"), value


def refuse_norm(match: Match) -> str | None:
    """Why the values bound by ``norms`` are no norm, or None."""
    if match["flaw"] or match["shared"]:
        reason: str = match["flaw"] or match["shared"]
        return reason
    if match["eps"] == 0 and match["centred"]:
        return "nothing is added to the variance: a row of equal values has no norm"
    for name in ("weight", "bias"):
        if match[name] is not None and not _holds(operand_dtype(match), match.val(name).dtype):
            return f"the {name} is {match.val(name).dtype}, not {operand_dtype(match)}"
    return None


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a norm in a type may have a weight of another: one of fewer bits, or float32 beside any."""
    return other == torch.float32 or torch.promote_types(dtype, other) == dtype


def operand_dtype(match: Match) -> torch.dtype:
    """The type that the norm works in: that of its input, or of its result where that holds more."""
    return torch.promote_types(match.val("x").dtype, match.root.meta["val"].dtype)


def common_dtype(match: Match) -> torch.dtype:
    """The type that holds the norm's input, result, weight and bias."""
    dtype = operand_dtype(match)
    for name in ("weight", "bias"):
        if match[name] is not None and not _is_exact(match.graph, match[name], dtype):
            dtype = torch.promote_types(dtype, match.val(name).dtype)
    return dtype


def _is_exact(graph: Graph, node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a weight is a constant whose values a type of fewer bits holds: it was cast before folding."""
    constant = graph.constant(node)
    return constant is not None and torch.equal(constant.to(dtype).to(constant.dtype), constant)


def cast(rewriter: Rewriter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node in another type: a cast that the match already has, or a new one."""
    if node.meta["val"].dtype == dtype:
        return node
    for user in node.users:
        if user in rewriter.match.nodes and widens(user) and user.meta["val"].dtype == dtype:
            return user
    return rewriter.call(aten.to.dtype, node, dtype)


def vector(rewriter: Rewriter, match: Match, name: str, dtype: torch.dtype) -> fx.Node | None:
    """A weight or bias in the shape of the normalised dimensions, of at least a type."""
    node = match[name]
    if node is None:
        return None
    sizes = [match.val("x").shape[dim] for dim in match["dims"]]
    if not same_shape(node.meta["val"].shape, sizes):
        node = rewriter.call(aten.reshape.default, node, sizes)
    exact = _is_exact(match.graph, match[name], dtype)
    return cast(rewriter, node, dtype if exact else torch.promote_types(dtype, node.meta["val"].dtype))


def last(match: Match) -> tuple[list[int], list[int]] | None:
    """The permutation that brings the normalised dimensions to the end, and its inverse; None for none."""
    rank, dims = match.val("x").dim(), match["dims"]
    order = [dim for dim in range(rank) if dim not in dims] + list(dims)
    if order == list(range(rank)):
        return None
    return order, [order.index(dim) for dim in range(rank)]


def has_fixed_size(match: Match) -> bool:
    """Whether the normalised dimensions have sizes that no input changes."""
    return all(isinstance(match.val("x").shape[dim], int) for dim in match["dims"])
