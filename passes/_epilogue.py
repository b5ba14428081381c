"""What may follow a product in the same kernel: an activation and a residual."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import argument
from graphopt.kernels.quick_gelu import OP as QUICK_GELU

aten = torch.ops.aten

# The op's name in kernels/_activations.py, and the argument that is its parameter there.
_ACTIVATIONS: dict[Any, tuple[str, str | None]] = {
    aten.relu.default: ("relu", None),
    aten.relu6.default: ("relu6", None),
    aten.leaky_relu.default: ("leaky_relu", "negative_slope"),
    aten.elu.default: ("elu", "alpha"),
    aten.selu.default: ("selu", None),
    aten.sigmoid.default: ("sigmoid", None),
    aten.tanh.default: ("tanh", None),
    aten.softplus.default: ("softplus", None),
    aten.silu.default: ("silu", None),
    aten.mish.default: ("mish", None),
    aten.hardswish.default: ("hardswish", None),
    aten.hardsigmoid.default: ("hardsigmoid", None),
    aten.gelu.default: ("gelu", None),
    QUICK_GELU.overload: ("quick_gelu", "alpha"),
}


_TARGETS = {name: (target, parameter) for target, (name, parameter) in _ACTIVATIONS.items()}


def activations(graph: Graph) -> Iterator[fx.Node]:
    """Every activation of a graph that has a name."""
    for target in _ACTIVATIONS:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            if not node._erased and named(node) is not None:
                yield node


def is_activation(node: fx.Node) -> bool:
    """True for an activation that has a name."""
    return node.target in _ACTIVATIONS and named(node) is not None


def named(node: fx.Node) -> tuple[str, float] | None:
    """An activation's name and parameter in ``kernels/_activations.py``; None where its form has none."""
    name, parameter = _ACTIVATIONS[node.target]
    if node.target is aten.gelu.default and argument(node, "approximate") == "tanh":
        name = "gelu_tanh"
    if node.target is aten.softplus.default and argument(node, "beta") != 1:
        return None
    if node.target is aten.elu.default and (argument(node, "scale"), argument(node, "input_scale")) != (1, 1):
        return None
    return name, 1.0 if parameter is None else float(argument(node, parameter))


def summands(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a plain sum of two tensors of one shape and type, or None."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or argument(node, "alpha") != 1:
        return None
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    vals = [operand.meta["val"] for operand in (left, right)]
    if not all(isinstance(val, torch.Tensor) for val in vals) or vals[0].dtype != vals[1].dtype:
        return None
    return (left, right) if same_shape(vals[0].shape, vals[1].shape) else None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The node that alone reads a value, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def applied(rewriter: Rewriter, x: fx.Node, activation: str, parameter: float) -> fx.Node:
    """The call that an activation's name stands for, staged behind a node; the node itself for "none"."""
    if activation == "none":
        return x
    target, name = _TARGETS[activation.removesuffix("_tanh")]
    given: dict[str, Any] = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
    return rewriter.call(target, x, **given, **({name: parameter} if name else {}))
