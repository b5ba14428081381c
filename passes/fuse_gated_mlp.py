"""act(x Wg^T + bg) * (x Wu^T + bu), Wg and Wu one matrix or two -> gated_mlp(x, Wg, Wu, bg, bu, act).

Of experts, whose weights are one tensor and whose rows are in groups, -> grouped_gated_mlp(x, W, ends, act).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, op_name, same_shape
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.gated_mlp import OP as GATED_MLP
from graphopt.kernels.grouped_gated_mlp import OP as GROUPED_GATED_MLP

aten = torch.ops.aten

_ACTIVATIONS = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
}

_VIEWS = (aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default)


@dataclass(frozen=True)
class Projection:
    """Some rows of a linear layer's weight, by what is taken of its result.

    Args:
        linear: the layer, or the product of rows with their experts' weights.
        nodes: the layer and what takes its result apart.
        rows: how many there are.
        part: first row, end and step; None for all.
    """

    linear: fx.Node
    nodes: tuple[fx.Node, ...]
    rows: int
    part: tuple[int, int, int] | None = None


def pattern(graph: Graph) -> Iterator[Match]:
    """Every activation of a projection that is multiplied by another projection of the same value."""
    for op in _ACTIVATIONS:
        for act in graph.fx.find_nodes(op="call_function", target=op):
            product = None if act._erased else next(iter(act.users), None)
            if product is not None and product.target is aten.mul.Tensor and not product.kwargs:
                other = product.args[1] if product.args[0] is act else product.args[0]
                gate, up, views = _behind_views(act.args[0], other)
                yield from _of(graph, product, _projection(gate), _projection(up), act, views)
    for glu in graph.fx.find_nodes(op="call_function", target=aten.glu.default):
        whole = None if glu._erased else _projection(glu.args[0])
        if whole is not None and whole.part is None and _is_last(glu, argument(glu, "dim")):
            half = whole.rows // 2
            up, gate = (
                Projection(whole.linear, whole.nodes, half, (start, start + half, 1)) for start in (0, half)
            )
            yield from _of(graph, glu, gate, up)


def _of(
    graph: Graph,
    root: fx.Node,
    gate: Projection | None,
    up: Projection | None,
    act: fx.Node | None = None,
    views: tuple[fx.Node, ...] = (),
) -> Iterator[Match]:
    if gate is None or up is None or gate.linear.args[0] is not up.linear.args[0]:
        return
    nodes = tuple(sorted({*gate.nodes, *up.nodes, *views, root} | ({act} if act is not None else set())))
    bound = {"x": gate.linear.args[0], "gate": gate, "up": up, "act": act, "views": views}
    yield Match(graph, root, nodes, bound)


def _behind_views(gate: Any, up: Any) -> tuple[Any, Any, tuple[fx.Node, ...]]:
    """Both sides before the views that are taken of both alike, as of the heads of a mixture of experts."""
    views: list[fx.Node] = []
    while _are_one_view(gate, up):
        views += [up, gate]
        gate, up = gate.args[0], up.args[0]
    return gate, up, tuple(views)


def _are_one_view(one: Any, two: Any) -> bool:
    if not all(
        isinstance(node, fx.Node) and node.target in _VIEWS and not node.kwargs for node in (one, two)
    ):
        return False
    pairs = [(one.args[0], two.args[0])]
    if one.target is aten.reshape.default:
        pairs.append((one, two))  # the sizes may be other nodes
    elif one.args[1:] != two.args[1:]:
        return False
    alike = all(same_shape(a.meta["val"].shape, b.meta["val"].shape) for a, b in pairs)
    return one.target is two.target and alike


def _projection(node: Any) -> Projection | None:
    """The linear layer behind a value, and which part of its result the value is."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is aten.linear.default or _is_grouped(node):
        rows = node.meta["val"].shape[-1]
        return Projection(node, (node,), rows) if isinstance(rows, int) else None
    piece = node if node.target is operator.getitem else None
    source: Any = node.args[0] if node.args else None
    if piece is not None and source.target in (aten.split.Tensor, aten.split_with_sizes.default):
        whole = _projection(source.args[0])
        if whole is None or whole.part is not None or not _is_last(source.args[0], argument(source, "dim")):
            return None
        sizes = [part.shape[-1] for part in source.meta["val"]]
        start, rows = sum(sizes[: piece.args[1]]), sizes[piece.args[1]]  # type: ignore[index]
        return Projection(whole.linear, (*whole.nodes, source, node), rows, (start, start + rows, 1))
    if node.target is aten.select.int or (piece is not None and source.target is aten.unbind.int):
        return _of_a_split_dimension(node)
    if node.target is aten.slice.Tensor:
        whole = _projection(source)
        bounds = tuple(argument(node, name) for name in ("start", "end", "step"))
        fixed = all(bound is None or isinstance(bound, int) for bound in bounds)
        if whole is None or whole.part is not None or not fixed or not _is_last(node, argument(node, "dim")):
            return None
        part = slice(*bounds).indices(whole.rows)
        return Projection(whole.linear, (*whole.nodes, node), len(range(*part)), part)
    return None


def _of_a_split_dimension(node: fx.Node) -> Projection | None:
    """The part of a layer's result that one index takes once the last dimension is reshaped to two."""
    taken: Any = node if node.target is aten.select.int else node.args[0]
    index, view = (argument(node, "index") if taken is node else node.args[1]), taken.args[0]
    whole = _projection(view.args[0]) if view.target is aten.reshape.default else None
    if whole is None or whole.part is not None or not isinstance(index, int):
        return None
    shape, before = view.meta["val"].shape, view.args[0].meta["val"].shape
    dim = argument(taken, "dim") % len(shape)
    fixed = all(isinstance(size, int) for size in shape[-2:])
    if len(shape) < 2 or not fixed or not same_shape(shape[:-2], before[:-1]) or dim < len(shape) - 2:
        return None
    count, rows = shape[dim], shape[-1] if dim == len(shape) - 2 else shape[-2]
    index %= count
    last = dim == len(shape) - 1
    part = (index, whole.rows, count) if last else (index * rows, (index + 1) * rows, 1)
    return Projection(whole.linear, tuple(dict.fromkeys((*whole.nodes, view, taken, node))), rows, part)


def _is_grouped(node: fx.Node) -> bool:
    """Whether a call multiplies rows with the weights of their experts; transformers has an op of its own."""
    return node.target in (aten._grouped_mm.default, aten.bmm.default) or (
        op_name(node) == "transformers.grouped_mm_fallback"
    )


def _is_last(node: fx.Node, dim: int) -> bool:
    return dim in (-1, node.meta["val"].dim() - 1)


def check(match: Match) -> str | None:
    """Both weights are matrices of one shape, and nothing else reads the projections."""
    if _is_grouped(match["gate"].linear):
        return _refuse_grouped(match)
    shapes = []
    for side in (match["gate"], match["up"]):
        shape = list(argument(side.linear, "weight").meta["val"].shape)
        shapes.append([side.rows, *shape[1:]] if side.part else shape)
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        return f"the weights have shapes {shapes[0]} and {shapes[1]}, not one of two dimensions"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def _refuse_grouped(match: Match) -> str | None:
    product, sides = match["gate"].linear, (match["gate"], match["up"])
    columns = product.meta["val"].shape[-1]
    halves = {(0, columns // 2, 1), (columns // 2, columns, 1)}
    if match["up"].linear is not product:
        return "the experts' gate and up weights are two tensors, not one"
    if {side.part for side in sides} != halves:
        return "gate and up are not the halves of the experts' weights"
    if product.args[1].meta["val"].dim() != 3 or (_ends(product) is None) != (
        product.target is aten.bmm.default
    ):
        return "the experts' rows are not in groups"
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def _ends(product: fx.Node) -> Any:
    """The row behind each expert's last, or None where every expert has rows of its own."""
    return product.args[2] if len(product.args) > 2 else product.kwargs.get("offs")


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; two weights stay two, so that they are shared with the model, and of one both are views."""
    product = match["gate"].linear
    if _is_grouped(product):
        up_first = match["gate"].part[0] > 0
        given = match["x"], product.args[1], _ends(product), _activation(match), up_first
        gated = rewriter.call(GROUPED_GATED_MLP.overload, *given)
        rewriter.replace(match.root, gated)
        return
    sides = (match["gate"], match["up"])
    args = [_rows(rewriter, side, name) for name in ("weight", "bias") for side in sides]
    gated = rewriter.call(GATED_MLP.overload, match["x"], *args, _activation(match))
    for view in reversed(match["views"][::2]):
        gated = rewriter.call(view.target, gated, *view.args[1:])
    rewriter.replace(match.root, gated)


def _rows(rewriter: Rewriter, side: Projection, name: str) -> fx.Node | None:
    whole: fx.Node | None = argument(side.linear, name)
    if whole is None or side.part is None:
        return whole
    start, end, step = side.part
    return rewriter.call(aten.slice.Tensor, whole, 0, start, end, *([step] if step != 1 else []))


def _activation(match: Match) -> str:
    act = match["act"]
    if act is None:
        return "sigmoid"
    if act.target is aten.gelu.default and argument(act, "approximate") == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS[act.target]


PASS = register(Pass("fuse_gated_mlp", "fuse", pattern, rewrite, check))
