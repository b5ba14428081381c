"""The language of pointwise programs: its functions, in torch and in ONNX, its types, and how it is read.

    %2 = mul(%0, %1)
    %3 = sigmoid(%2, 1.0)
    %4 = add(%3, 1.0)

is a program of two inputs. A step is a name of ``FUNCTIONS`` with its operands: values by number, numbers
and, for ``to``, a type; or a name of ``REDUCTIONS`` with a value, which is taken together over the last
dimensions. How many of them is the same for the whole program, and no part of it.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.graph import same_shape
from graphopt.kernels import _activations
from graphopt.kernels._onnx import op
from graphopt.kernels._shape import require

_STEP = re.compile(r"%(\d+) = (\w+)\(([^()]+)\)")
TYPES = {
    "float16": (torch.float16, ir.DataType.FLOAT16),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16),
    "float32": (torch.float32, ir.DataType.FLOAT),
    "float64": (torch.float64, ir.DataType.DOUBLE),
}
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@dataclass(frozen=True)
class Function:
    """A name that a program may use.

    Args:
        arity: the number of its operands.
        torch: what it computes; a reduction takes its dimensions besides, counted from the last.
        onnx: the nodes that compute it; likewise.
    """

    arity: int
    torch: Callable[..., Any]
    onnx: Callable[..., Any]


def _maximum(x: Any, y: Any) -> torch.Tensor:
    """The larger of two tensors, or of a tensor and a number."""
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.maximum(x, y)
    return torch.clamp_min(x, y) if isinstance(x, torch.Tensor) else torch.clamp_min(y, x)


def _minimum(x: Any, y: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.minimum(x, y)
    return torch.clamp_max(x, y) if isinstance(x, torch.Tensor) else torch.clamp_max(y, x)


FUNCTIONS: dict[str, Function] = {
    "add": Function(2, operator.add, op.Add),
    "sub": Function(2, operator.sub, op.Sub),
    "mul": Function(2, operator.mul, op.Mul),
    "div": Function(2, operator.truediv, op.Div),
    "pow": Function(2, operator.pow, op.Pow),
    "maximum": Function(2, _maximum, op.Max),
    "minimum": Function(2, _minimum, op.Min),
    "lt": Function(2, operator.lt, op.Less),
    "le": Function(2, operator.le, op.LessOrEqual),
    "gt": Function(2, operator.gt, op.Greater),
    "ge": Function(2, operator.ge, op.GreaterOrEqual),
    "eq": Function(2, operator.eq, op.Equal),
    "ne": Function(2, operator.ne, lambda x, y: op.Not(op.Equal(x, y))),
    "where": Function(3, torch.where, op.Where),
    "neg": Function(1, torch.neg, op.Neg),
    "abs": Function(1, torch.abs, op.Abs),
    "exp": Function(1, torch.exp, op.Exp),
    "log": Function(1, torch.log, op.Log),
    "erf": Function(1, torch.erf, op.Erf),
    "sin": Function(1, torch.sin, op.Sin),
    "cos": Function(1, torch.cos, op.Cos),
    "floor": Function(1, torch.floor, op.Floor),
    "ceil": Function(1, torch.ceil, op.Ceil),
    "sqrt": Function(1, torch.sqrt, op.Sqrt),
    "rsqrt": Function(1, torch.rsqrt, lambda x: op.Reciprocal(op.Sqrt(x))),
    "reciprocal": Function(1, torch.reciprocal, op.Reciprocal),
    "square": Function(1, torch.square, lambda x: op.Mul(x, x)),
    "to": Function(2, lambda x, name: x.to(TYPES[name][0]), lambda x, name: op.Cast(x, to=TYPES[name][1])),
    **{
        name: Function(2, compute, _activations.ONNX[name])
        for name, compute in _activations.TORCH.items()
        if name != "none"
    },
}


def _prod(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """torch.prod takes one dimension at a time."""
    for axis in axes:
        x = x.prod(axis, keepdim=True)
    return x


def _reduce(name: str) -> Callable[[Any, Sequence[int]], Any]:
    """ONNX's reduction of that name, which keeps the dimensions at size 1."""
    return lambda x, axes: getattr(op, name)(x, op.Constant(value_ints=list(axes)), keepdims=1)


REDUCTIONS: dict[str, Function] = {
    "sum": Function(1, lambda x, axes: x.sum(axes, keepdim=True), _reduce("ReduceSum")),
    "mean": Function(1, lambda x, axes: x.mean(axes, keepdim=True), _reduce("ReduceMean")),
    "amax": Function(1, lambda x, axes: x.amax(axes, keepdim=True), _reduce("ReduceMax")),
    "amin": Function(1, lambda x, axes: x.amin(axes, keepdim=True), _reduce("ReduceMin")),
    "prod": Function(1, _prod, _reduce("ReduceProd")),
    "norm": Function(1, lambda x, axes: torch.linalg.vector_norm(x, 2, axes, True), _reduce("ReduceL2")),
    "softmax": Function(1, lambda x, axes: x.softmax(*axes), lambda x, axes: op.Softmax(x, axis=axes[0])),
    "log_softmax": Function(
        1, lambda x, axes: x.log_softmax(*axes), lambda x, axes: op.LogSoftmax(x, axis=axes[0])
    ),
}
OVER_ONE = ("softmax", "log_softmax")  # over one dimension; they keep its size


@dataclass(frozen=True)
class Operand:
    """A value of the program, by its number."""

    index: int


Step = tuple[str, tuple[Operand | int | float | str, ...]]


@functools.lru_cache(maxsize=4096)
def parse(program: str, inputs: int) -> tuple[Step, ...]:
    """The steps of a program.

    Args:
        program: see above.
        inputs: how many there are.

    Raises:
        ValueError: a line is no step, or reads what is not there yet.
    """
    steps: list[Step] = []
    for line in program.splitlines():
        found = _STEP.fullmatch(line)
        own = inputs + len(steps)
        require(found is not None and int(found[1]) == own, f"pointwise: {line!r} is not the step %{own}")
        assert found is not None
        name, operands = found[2], tuple(map(_operand, found[3].split(", ")))
        function = FUNCTIONS.get(name) or REDUCTIONS.get(name)
        known = function is not None and len(operands) == function.arity
        require(known, f"pointwise: there is no {name} of {len(operands)} operands")
        for operand in operands:
            fits = not isinstance(operand, Operand) or operand.index < own
            require(fits, f"pointwise: {line!r} reads what is not there yet")
            fits = not isinstance(operand, str) or (name == "to" and operand in TYPES)
            require(fits, f"pointwise: {line!r} has no use for {operand}")
        steps.append((name, operands))
    require(steps, "pointwise: the program is empty")
    return tuple(steps)


def _operand(text: str) -> Operand | int | float | str:
    if text.startswith("%"):
        return Operand(int(text[1:]))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def typed(program: str, given: Sequence[torch.dtype]) -> list[torch.dtype]:
    """The types of a program's values, its inputs' first.

    Args:
        program: see above.
        given: the inputs' types.

    Raises:
        ValueError: the program is none, or the types of a step's tensors differ.
    """
    dtypes = list(given)
    for name, operands in parse(program, len(given)):
        read = [dtypes[operand.index] for operand in operands if isinstance(operand, Operand)]
        own = read[1:] if name == "where" else read
        require(own, f"pointwise: {name} reads no tensor")
        require(len(set(own)) == 1, f"pointwise: the tensors of {name} are {read}")
        fits = name not in REDUCTIONS or own[0].is_floating_point
        require(fits, f"pointwise: {name} reads {own[0]}")
        dtypes.append(_dtype(name, operands, read))
    return dtypes


def _dtype(name: str, operands: tuple[Any, ...], read: list[torch.dtype]) -> torch.dtype:
    if name in COMPARISONS:
        return torch.bool
    return TYPES[operands[1]][0] if name == "to" else read[-1]


def shaped(program: str, given: Sequence[Sequence[Any]], dims: int) -> list[tuple[Any, ...]]:
    """The shapes of a program's values, its inputs' first; a reduction leaves dimensions of size 1.

    Args:
        program: see above.
        given: the inputs' shapes, which broadcast.
        dims: how many last dimensions its reductions are over.

    Raises:
        ValueError: the program is none; it reduces what has not the whole shape that all inputs broadcast to,
            no dimension, or with softmax several.
    """
    whole = tuple(torch.broadcast_shapes(*given))
    rows = (*whole[: len(whole) - dims], *(1,) * dims)
    shapes = [tuple(shape) for shape in given]
    for name, operands in parse(program, len(given)):
        read = [shapes[operand.index] for operand in operands if isinstance(operand, Operand)]
        if name not in REDUCTIONS:
            shapes.append(tuple(torch.broadcast_shapes(*read)))
            continue
        require(1 <= dims <= len(whole), f"pointwise: {name} is over {dims} dimensions of {len(whole)}")
        require(dims == 1 or name not in OVER_ONE, f"pointwise: {name} is over one dimension, not {dims}")
        fits = same_shape(read[0], whole)
        require(fits, f"pointwise: {name} reads {read[0]}, but whole rows are of {whole}")
        shapes.append(whole if name in OVER_ONE else rows)
    return shapes
