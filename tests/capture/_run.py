"""Running a captured graph as the original is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.capture.export import capture
from graphopt.ir.graph import Graph
from graphopt.runtime.calling import CallingConvention
from tests._models import FAMILIES, Example


@functools.cache
def example_of(family: str) -> Example:
    """A tiny model of a family and a call of it, made once for all tests."""
    return FAMILIES[family]()


@functools.cache
def captured(family: str, *, dynamic: bool) -> Graph:
    """A tiny model of a family, captured once for all tests, which leave it as it is."""
    example = example_of(family)
    return capture(example.model, example.args, example.kwargs, dynamic=example.dynamic if dynamic else None)


def run(graph: Graph, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the graph returns, in the original's containers."""
    calling = CallingConvention(graph, forward)
    with torch.no_grad():
        return calling.unflatten(graph.module(*calling.flatten(args, kwargs)))


def same(left: Any, right: Any) -> bool:
    """True when both have the same structure, types included, and the same leaves, to the last bit."""
    (left_leaves, left_spec), (right_leaves, right_spec) = map(pytree.tree_flatten, (left, right))
    return left_spec == right_spec and all(map(_same_leaf, left_leaves, right_leaves))


def _same_leaf(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor):
        return type(left) is type(right) and left == right
    return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
