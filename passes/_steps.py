"""Calls as steps of a pointwise program, the language of ``kernels/_program.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.pattern import argument, arguments
from graphopt.kernels._program import COMPARISONS, FUNCTIONS
from graphopt.passes._epilogue import is_activation, named

aten = torch.ops.aten

_ARITHMETIC = ("add", "sub", "mul", "div")
_UNARY = (
    *("neg", "abs", "exp", "log", "erf", "sin", "cos", "floor", "ceil"),
    *("sqrt", "rsqrt", "reciprocal", "square"),
)
_NAMES: dict[Any, str] = {
    **{getattr(getattr(aten, name), of): name for name in _ARITHMETIC for of in ("Tensor", "Scalar")},
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "pow",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.clamp_min.default: "maximum",
    aten.clamp_max.default: "minimum",
    **{getattr(getattr(aten, name), of): name for name in COMPARISONS for of in ("Tensor", "Scalar")},
    **{getattr(aten.where, of): "where" for of in ("self", "ScalarSelf", "ScalarOther")},
    **{getattr(aten, name).default: name for name in _UNARY},
    aten.to.dtype: "to",
}
DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def refuse_step(node: fx.Node) -> str | None:
    """Why a call is no step of a program, or None."""
    name = getattr(node.target, "__name__", str(node.target))
    if node.target not in _NAMES and not is_activation(node):
        return f"{name} has no name in a program"
    dtypes = [source.meta["val"].dtype for source in node.all_input_nodes if is_tensor(source)]
    if len(dtypes) < len(node.all_input_nodes):
        return f"{name} reads a size"
    own = dtypes[1:] if _NAMES.get(node.target) == "where" and len(node.all_input_nodes) > 1 else dtypes
    if len(set(own)) != 1 or own[0] not in DTYPES:
        return f"the operands of {name} are {' and '.join(map(str, dtypes))}"
    name, operands = step_of(node)
    known = all(isinstance(operand, fx.Node) or type(operand) in (int, float, str) for operand in operands)
    return None if known and _is_plain(node) else f"{name} has an option that a program does not name"


def step_of(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """A call's name and operands in a program."""
    if node.target not in _NAMES:
        name, parameter = named(node) or ("", 1.0)
        return name, (node.args[0], parameter)
    name = _NAMES[node.target]
    if name == "to":
        return name, (node.args[0], DTYPES.get(node.meta["val"].dtype, "another type"))
    return name, tuple(node.args[: FUNCTIONS[name].arity])


def _is_plain(node: fx.Node) -> bool:
    """Whether the arguments that a program does not name have their defaults."""
    if node.target is aten.to.dtype:
        return node.meta["val"].dtype in DTYPES and argument(node, "memory_format") is None
    if node.target not in _NAMES:
        return True
    given = list(arguments(node).values())[FUNCTIONS[_NAMES[node.target]].arity :]
    return all(value == default for value, default in given)


def is_tensor(node: fx.Node) -> bool:
    """True for a node that gives one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_floating(node: fx.Node) -> bool:
    """True for a node that gives one floating tensor."""
    return is_tensor(node) and node.meta["val"].is_floating_point()


def written(number: dict[fx.Node, int], name: str, operands: tuple[Any, ...]) -> str:
    """A step as a program has it.

    Args:
        number: of the values that it may read.
        name: of the function.
        operands: nodes, numbers and, for ``to``, a type.
    """
    read = (f"%{number[operand]}" if isinstance(operand, fx.Node) else str(operand) for operand in operands)
    return f"{name}({', '.join(read)})"
