"""One spelling for what export spells in several, so that every pass has one thing to match.

``torch.export`` gives a graph in the model's own words; ``run_decompositions({})`` makes it functional, which
traces it a second time, as long as the first. A graph that is functional as it is needs no second trace: what
that would spell otherwise is spelled here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.ir.aten import is_kept_whole
from graphopt.ir.graph import Graph, has_effect
from graphopt.ir.provenance import KEY

aten = torch.ops.aten


def is_functional(graph: fx.Graph) -> bool:
    """True when ``normalize`` makes of a graph what it would make of it traced once more.

    Nothing in it writes to a tensor; each call is one that tracing keeps whole, or one that ``normalize``
    knows the spelling of; and no size is symbolic, since tracing writes sizes in words of its own.
    """
    return all(_stays(node) for node in graph.nodes)


def _stays(node: fx.Node) -> bool:
    if any(not isinstance(size, int) for size in _sizes(node)):
        return False
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if node.target in _SPELLINGS:
        return _SPELLINGS[node.target](node)
    return node.target is operator.getitem or is_kept_whole(node.target)


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes of a node's value; the value itself where it is a size."""
    values = pytree.tree_leaves(node.meta.get("val"))
    sizes = [value.shape if isinstance(value, torch.Tensor) else [value] for value in values]
    return [size for shape in sizes for size in shape if size is not None]


def normalize(graph: Graph) -> None:
    """Rewrite a freshly captured graph to its normal form, in place.

    The graph is functional: nobody inside can see whether a value is a view. So ``view``, ``_unsafe_view``
    and ``flatten`` are ``reshape``; ``clone``, ``alias``, ``lift_fresh_copy``, ``detach``, ``contiguous`` and
    ``dropout`` are the value itself (but for a ``clone`` that is returned, which the caller may write to);
    ``_to_copy`` and ``to`` are the cast that they make; ``chunk`` is ``split``; inference batch norm is one
    op again; and export's metadata assertions, which InputSpec checks at every call, are dropped, as is what
    nobody reads.
    """
    for node in graph.calls:
        rule = None if node._erased else _RULES.get(node.target)
        if rule is not None:
            rule(graph, node)
    for node in reversed(graph.calls):
        if has_effect(node):
            node.meta.setdefault("val", None)  # export gives some assertions none
        elif not node.users:
            graph.fx.erase_node(node)
    graph.module.recompile()


def _as_reshape(graph: Graph, node: fx.Node) -> None:
    """With every size that is known in place of the one that is asked for as -1."""
    source, asked = (*node.args, *node.kwargs.values())
    known = zip(asked, node.meta["val"].shape, strict=True)  # type: ignore[arg-type]
    sizes = [size if given == -1 and isinstance(size, int) else given for given, size in known]
    node.target = aten.reshape.default
    node.args, node.kwargs = (source, sizes), {}


def _as_input(graph: Graph, node: fx.Node) -> None:
    source = node.args[0]
    node.replace_all_uses_with(source)  # type: ignore[arg-type]
    graph.fx.erase_node(node)


def _as_input_inside(graph: Graph, node: fx.Node) -> None:
    if graph.output not in node.users:
        _as_input(graph, node)


def _as_copy(graph: Graph, node: fx.Node) -> None:
    node.target = aten.clone.default
    node.args, node.kwargs = node.args[:1], {}
    _as_input_inside(graph, node)


def _as_contiguous(graph: Graph, node: fx.Node) -> None:
    source, layout = _arguments(node, "self", "memory_format")
    if source.meta["val"].is_contiguous(memory_format=layout or torch.contiguous_format):
        _as_input(graph, node)
        return
    node.target = aten.clone.default
    node.args, node.kwargs = (source,), {"memory_format": layout or torch.contiguous_format}
    _as_input_inside(graph, node)


def _drop(graph: Graph, node: fx.Node) -> None:
    if not node.users:
        graph.fx.erase_node(node)


def _flat(graph: Graph, node: fx.Node) -> None:
    shape = node.meta["val"].shape
    if all(isinstance(size, int) for size in shape):
        node.target = aten.reshape.default
        node.args, node.kwargs = (node.args[0], list(shape)), {}


def _as_split(graph: Graph, node: fx.Node) -> None:
    source, dim = _arguments(node, "self", "dim")
    node.target = aten.split.Tensor
    node.args = (source, node.meta["val"][0].shape[dim], dim)
    node.kwargs = {}


def _arguments(node: fx.Node, *names: str) -> tuple[Any, ...]:
    """The named arguments of a call, however they were given."""
    schema: Any = node.target
    given = dict(zip((arg.name for arg in schema._schema.arguments), node.args, strict=False)) | node.kwargs
    defaults = {arg.name: arg.default_value for arg in schema._schema.arguments if arg.has_default_value()}
    return tuple({**defaults, **given}.get(name) for name in names)


def _as_result_dtype(graph: Graph, node: fx.Node) -> None:
    """Any ``to``, as the cast from its argument's dtype to its own."""
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    if dtype == source.meta["val"].dtype:
        _as_input(graph, node)
        return
    node.target = aten.to.dtype
    node.args, node.kwargs = (source, dtype), {}


def _as_plain_batch_norm(graph: Graph, node: fx.Node) -> None:
    node.args = (*node.args[:8], False)  # whether cuDNN may be used is for the executor to say


def _as_cast(graph: Graph, node: fx.Node) -> None:
    dtype = node.kwargs.get("dtype")
    device = node.kwargs.get("device")
    source: Any = node.args[0]
    if device is not None and torch.device(device) != source.meta["val"].device:  # type: ignore[arg-type]
        return
    if dtype is None or dtype == source.meta["val"].dtype:
        _as_input(graph, node)
        return
    node.target = aten.to.dtype
    node.args = (source, dtype)
    node.kwargs = {}


def _as_batch_norm(graph: Graph, node: fx.Node) -> None:
    """Inference batch norm as the composite op; its two statistics outputs are empty and unread."""
    source, weight, bias, mean, var, momentum, eps = node.args
    with graph.fx.inserting_before(node):
        args = (source, weight, bias, mean, var, False, momentum, eps, False)
        whole = graph.call(aten.batch_norm.default, args, {}, node.meta[KEY])
    whole.meta[KEY] = replace(node.meta[KEY], origins=(whole.name,))
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(whole)
        graph.erase_dead([user])
    graph.erase_dead([node])


def _on_its_device(node: fx.Node) -> bool:
    source: Any = node.args[0]
    return bool(node.meta["val"].device == source.meta["val"].device)


_SPELLINGS: dict[Any, Callable[[fx.Node], bool]] = {
    aten.reshape.default: lambda node: True,
    aten.flatten.using_ints: lambda node: True,
    aten.contiguous.default: lambda node: True,
    aten.detach_.default: lambda node: True,
    aten.dropout.default: lambda node: not _arguments(node, "train")[0],
    aten.to.dtype: _on_its_device,
    aten.to.dtype_layout: _on_its_device,
    aten.to.device: _on_its_device,
    aten.chunk.default: lambda node: node.meta["val"][0].shape[_arguments(node, "dim")[0]] > 0,
    aten.batch_norm.default: lambda node: len(node.args) == 9 and node.args[5] is False,
    aten._assert_tensor_metadata.default: lambda node: not node.users,
}

_RULES: dict[Any, Callable[[Graph, fx.Node], None]] = {
    aten.view.default: _as_reshape,
    aten._unsafe_view.default: _as_reshape,
    aten.reshape.default: _as_reshape,
    aten.flatten.using_ints: _flat,
    aten.chunk.default: _as_split,
    aten.clone.default: _as_input_inside,
    aten.alias.default: _as_input,
    aten.contiguous.default: _as_contiguous,
    aten.detach.default: _as_input,
    aten.detach_.default: _as_input,
    aten.dropout.default: _as_copy,
    aten.lift_fresh_copy.default: _as_input,
    aten._to_copy.default: _as_cast,
    aten.to.dtype: _as_result_dtype,
    aten.to.dtype_layout: _as_result_dtype,
    aten.to.device: _as_result_dtype,
    aten.batch_norm.default: _as_plain_batch_norm,
    aten._native_batch_norm_legit_no_training.default: _as_batch_norm,
    aten._assert_tensor_metadata.default: _drop,
}
