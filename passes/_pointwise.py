"""What works on every element by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.passes._ranges import as_uniform

aten = torch.ops.aten

_UNTAGGED = {
    *(aten.to.dtype, aten.square.default, aten.special_ndtr.default),
    *(aten.hardswish.default, aten.log_sigmoid.default),
}
_FILLS = {aten.full.default, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default}
_FILLS_LIKE = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}


def is_pointwise(node: Any) -> bool:
    """True for a call whose every element depends on the operands' elements at that place alone."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta["val"], torch.Tensor):
        return False
    tags = node.target.tags
    random = torch.Tag.nondeterministic_seeded in tags
    return node.target in _UNTAGGED or (torch.Tag.pointwise in tags and not random)


def literal(graph: Graph, node: Any) -> bool | int | float | None:
    """The number that an operand stands for: a constant of one element, or a tensor filled with one."""
    constant = graph.constant(node)
    if constant is not None:
        one = constant.numel() == 1 and not constant.is_complex()
        return constant.item() if one else None
    is_fill = isinstance(node, fx.Node) and node.target in _FILLS | _FILLS_LIKE
    return as_uniform(graph, node) if is_fill else None
