"""affine(reshape(norm(reshape(x, [B, G, ...])))) in any spelling -> group_norm(x, G, w, b, eps)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.passes._moments import widens
from graphopt.passes._norms import norms, refuse_norm, unwidened

aten = torch.ops.aten

_VIEWS = (aten.reshape.default, aten.unsqueeze.default)
_CASTS = (aten.to.dtype, aten.type_as.default)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every norm of a reshaped tensor that is reshaped back, and scaled or shifted a channel."""
    for norm in _grouped_norms(graph):
        match = None if norm["weight"] is not None or norm["bias"] is not None else _whole(norm)
        if match is not None:
            yield match


def check(match: Match) -> str | None:
    """Fixed channels and groups, one type, and steps that nobody else reads."""
    reason, x = refuse_norm(match), match.val("source")
    if reason is not None:
        return reason
    if match["scale"] != 1:
        return f"the norm is multiplied by {match['scale']:g}"
    if not isinstance(x.shape[1], int):
        return "the number of channels is dynamic"
    for name in ("affine_weight", "affine_bias"):
        if match[name] is not None and match.val(name).dtype != x.dtype:
            return f"the {name.removeprefix('affine_')} is {match.val(name).dtype}, the tensor {x.dtype}"
    if match.root.meta["val"].dtype != x.dtype:
        return f"the norm is {match.root.meta['val'].dtype}, of values that are {x.dtype}"
    shared = shared_inside(match, match["views"])
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Torch's own op, of the tensor in its own shape."""
    channels = match.val("source").shape[1]
    vectors: list[fx.Node | None] = []
    for name in ("affine_weight", "affine_bias"):
        node = match[name]
        flat = node is None or same_shape(node.meta["val"].shape, [channels])
        vectors.append(node if flat else rewriter.call(aten.reshape.default, node, [channels]))
    call = rewriter.call(aten.group_norm.default, match["source"], match["groups"], *vectors, match["eps"])
    rewriter.replace(match.root, call)


def _grouped_norms(graph: Graph) -> Iterator[Match]:
    """Norms that are spelled out, and those of torch over trailing dimensions of a reshaped tensor."""
    yield from norms(graph, centred=True)
    for target in (aten.layer_norm.default, aten.instance_norm.default):
        for node in graph.fx.find_nodes(op="call_function", target=target):
            if not node._erased:
                yield _of_torch(graph, node)


def _of_torch(graph: Graph, node: fx.Node) -> Match:
    x: Any = node.args[0]
    rank, flaw = x.meta["val"].dim(), ""
    count = rank - 2
    if node.target is aten.layer_norm.default:
        count = len(argument(node, "normalized_shape"))
    elif not argument(node, "use_input_stats"):
        flaw = "the statistics are not the input's"
    bound = {"x": x, "dims": tuple(range(rank - count, rank)), "eps": float(argument(node, "eps"))}
    bound |= {name: argument(node, name) for name in ("weight", "bias")}
    bound |= {"scale": 1.0, "centred": True, "flaw": flaw, "shared": None}
    return Match(graph, node, (node,), bound)


def _whole(norm: Match) -> Match | None:
    """The match with its reshapes and affine; None where groups and channels are something else."""
    nodes, affine = [*norm.nodes], dict[str, Any](affine_weight=None, affine_bias=None)
    back = _only_reader(_grown(norm.root, nodes, affine, norm.val("x").shape, (1, 2)))
    if back is None or back.target is not aten.reshape.default:
        return None
    shape = back.meta["val"].shape
    views, groups = _views_up_to(norm["x"], shape), _groups(norm, shape)
    if views is None or groups is None:
        return None
    nodes.append(back)
    root = _grown(back, nodes, affine, shape, (1,))
    vectors = [node for node in affine.values() if node is not None]
    if not all(same_size(node.meta["val"].numel(), shape[1]) for node in vectors):
        return None
    fixed = all(isinstance(norm.val("x").shape[dim], int) for dim in norm["dims"])
    if fixed and not vectors:
        return None  # a layer norm says it as well
    bound = {**norm.bindings, **affine, "source": views[-1].args[0], "views": views, "groups": groups}
    return replace(norm, root=root, nodes=tuple(sorted({*views, *nodes})), bindings=bound)


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The call that alone reads a node and gives one tensor, or None."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and isinstance(reader.meta.get("val"), torch.Tensor) else None


def _views_up_to(node: fx.Node, shape: Any) -> list[fx.Node] | None:
    """The reshapes between a node and the tensor of that shape which it shows in another."""
    views = []
    while node.op == "call_function" and node.target is aten.reshape.default:
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
        if same_shape(node.meta["val"].shape, shape):
            return views
    return None


def _groups(norm: Match, shape: Any) -> int | None:
    """How many groups the leading dimensions make of the channels; None when they are something else."""
    sizes, dims = norm.val("x").shape, norm["dims"]
    rank, leading = len(sizes), sizes[: len(sizes) - len(dims)]
    if dims != tuple(range(len(leading), rank)) or len(shape) < 2 or not isinstance(shape[1], int):
        return None
    divisors = [groups for groups in range(1, shape[1] + 1) if shape[1] % groups == 0]
    for groups in divisors:
        if same_shape(leading, (shape[0], groups)) or same_shape(leading, (shape[0] * groups,)):
            return groups
    return None


def _grown(
    node: fx.Node, nodes: list[fx.Node], affine: dict[str, Any], shape: Any, channels: tuple[int, ...]
) -> fx.Node:
    """The last of the casts, factors and shifts of a channel behind a node; they join ``nodes``."""
    last = node
    while (user := _only_reader(last)) is not None and same_shape(user.meta["val"].shape, shape):
        step: dict[str, Any] = {}
        if user.target not in _CASTS or user.args[0] is not last:
            step = _affine(user, last, shape, channels)
            if not step or affine["affine_bias"] is not None or step.keys() & _taken(affine):
                break
        affine |= step
        nodes.append(user)
        last = user
    while last is not node and last.target in _CASTS and widens(last):  # the readers' business
        nodes.remove(last)
        last = last.args[0]  # type: ignore[assignment]
    return last


def _taken(affine: dict[str, Any]) -> set[str]:
    return {name for name, node in affine.items() if node is not None}


def _affine(user: fx.Node, node: fx.Node, shape: Any, channels: tuple[int, ...]) -> dict[str, Any]:
    """The weight or bias of each channel that a call applies to a node; empty for another call."""
    names = {
        aten.mul.Tensor: ("affine_weight",),
        aten.add.Tensor: ("affine_bias",),
        aten.addcmul.default: ("affine_bias", "affine_weight"),
    }.get(user.target, ())
    values = [value for value in user.args if value is not node]
    first = user.target is aten.addcmul.default and user.args[0] is node
    if not names or len(values) != len(names) or user.kwargs or first:
        return {}
    vectors = [_channel_vector(value, shape, channels) for value in values]
    return {} if None in vectors else dict(zip(names, vectors, strict=True))


def _channel_vector(value: Any, shape: Any, channels: tuple[int, ...]) -> fx.Node | None:
    """The constant of one value a channel behind the views that line it up with the channels, or None."""
    val = value.meta["val"] if isinstance(value, fx.Node) else None
    if not isinstance(val, torch.Tensor):
        return None
    wanted = [size if dim in channels else 1 for dim, size in enumerate(shape)]
    if not same_shape([1] * (len(shape) - val.dim()) + list(val.shape), wanted):
        return None
    node = unwidened(value)
    while node.op == "call_function" and node.target in _VIEWS:
        node = unwidened(node.args[0])
    return node if node.op == "get_attr" else None


PASS = register(Pass("fuse_group_norm", "fuse", pattern, rewrite, check))
