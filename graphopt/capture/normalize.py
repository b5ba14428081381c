"""One spelling for what export spells in several, so that every pass has one thing to match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.provenance import KEY

aten = torch.ops.aten


def normalize(graph: Graph) -> None:
    """Rewrite a freshly captured graph to its normal form, in place.

    The graph is functional: nobody inside can see whether a value is a view. So ``view``, ``_unsafe_view``
    and ``flatten`` are ``reshape``; ``clone``, ``alias``, ``lift_fresh_copy``, ``detach`` and ``contiguous``
    are the value itself (but for a ``clone`` that is returned, which the caller may write to); ``_to_copy``
    is the cast it makes; inference batch norm is one op again; and export's metadata assertions, which
    InputSpec checks at every call, are dropped.
    """
    for node in graph.calls:
        rule = None if node._erased else _RULES.get(node.target)
        if rule is not None:
            rule(graph, node)
    graph.module.recompile()


def _as_reshape(graph: Graph, node: fx.Node) -> None:
    node.target = aten.reshape.default


def _as_input(graph: Graph, node: fx.Node) -> None:
    source = node.args[0]
    node.replace_all_uses_with(source)  # type: ignore[arg-type]
    graph.fx.erase_node(node)


def _as_input_inside(graph: Graph, node: fx.Node) -> None:
    if graph.output not in node.users:
        _as_input(graph, node)


def _drop(graph: Graph, node: fx.Node) -> None:
    if not node.users:
        graph.fx.erase_node(node)


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


_RULES: dict[Any, Callable[[Graph, fx.Node], None]] = {
    aten.view.default: _as_reshape,
    aten._unsafe_view.default: _as_reshape,
    aten.clone.default: _as_input_inside,
    aten.alias.default: _as_input,
    aten.contiguous.default: _as_input,
    aten.detach.default: _as_input,
    aten.lift_fresh_copy.default: _as_input,
    aten._to_copy.default: _as_cast,
    aten._native_batch_norm_legit_no_training.default: _as_batch_norm,
    aten._assert_tensor_metadata.default: _drop,
}
