"""A chain of pointwise steps as one op, whose program a generator makes one kernel of.

    out = program(inputs), for example out = sigmoid(a * b) + 1 as

    %2 = mul(%0, %1)
    %3 = sigmoid(%2)
    %4 = add(%3, 1.0)

A program is a step a line; ``%0`` and those after it are the inputs, then the steps. A step is a name below
of values, numbers and, for ``to``, a type. A step's tensors have one type, but for ``where``'s condition.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels import _activations
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._shape import nbytes, require

SCHEMA = "(Tensor[] inputs, str program) -> Tensor"

_STEP = re.compile(r"%(\d+) = (\w+)\(([^()]+)\)")
_TYPES = {
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
        torch: what it computes.
        onnx: the nodes that compute it.
    """

    arity: int
    torch: Callable[..., Any]
    onnx: Callable[..., Any]


FUNCTIONS: dict[str, Function] = {
    "add": Function(2, operator.add, op.Add),
    "sub": Function(2, operator.sub, op.Sub),
    "mul": Function(2, operator.mul, op.Mul),
    "div": Function(2, operator.truediv, op.Div),
    "pow": Function(2, operator.pow, op.Pow),
    "maximum": Function(2, torch.maximum, op.Max),
    "minimum": Function(2, torch.minimum, op.Min),
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
    "to": Function(2, lambda x, name: x.to(_TYPES[name][0]), lambda x, name: op.Cast(x, to=_TYPES[name][1])),
    **{
        name: Function(2, compute, _activations.ONNX[name])
        for name, compute in _activations.TORCH.items()
        if name != "none"
    },
}


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
        known = name in FUNCTIONS and len(operands) == FUNCTIONS[name].arity
        require(known, f"pointwise: there is no {name} of {len(operands)} operands")
        for operand in operands:
            fits = not isinstance(operand, Operand) or operand.index < own
            require(fits, f"pointwise: {line!r} reads what is not there yet")
            fits = not isinstance(operand, str) or (name == "to" and operand in _TYPES)
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


def _shape(inputs: Sequence[torch.Tensor], program: str) -> torch.Tensor:
    """The shape rule.

    Args:
        inputs: of shapes that broadcast, floating or bool.
        program: see above.

    Returns:
        An empty tensor of the broadcast shape, of the last step's type.

    Raises:
        ValueError: the program is none, or the types of a step's tensors differ.
    """
    dtypes = [x.dtype for x in inputs]
    for x in inputs:
        fits = x.dtype.is_floating_point or x.dtype == torch.bool
        require(fits, f"pointwise: inputs must be floating or bool, not {x.dtype}")
    for name, operands in parse(program, len(inputs)):
        given = [dtypes[operand.index] for operand in operands if isinstance(operand, Operand)]
        own = given[1:] if name == "where" else given
        require(own, f"pointwise: {name} reads no tensor")
        require(len(set(own)) == 1, f"pointwise: the tensors of {name} are {given}")
        dtypes.append(_dtype(name, operands, given))
    require(dtypes[-1].is_floating_point, f"pointwise: the result must be floating, not {dtypes[-1]}")
    return inputs[0].new_empty(torch.broadcast_shapes(*(x.shape for x in inputs)), dtype=dtypes[-1])


def _dtype(name: str, operands: tuple[Any, ...], given: list[torch.dtype]) -> torch.dtype:
    if name in COMPARISONS:
        return torch.bool
    return _TYPES[operands[1]][0] if name == "to" else given[-1]


def _reference(inputs: Sequence[torch.Tensor], program: str) -> torch.Tensor:
    values = list(inputs)
    for name, operands in parse(program, len(inputs)):
        read = [values[o.index] if isinstance(o, Operand) else o for o in operands]
        values.append(FUNCTIONS[name].torch(*read))
    return values[-1].contiguous()


def _cost(inputs: Sequence[torch.Tensor], program: str) -> Cost:
    """An operation a step and element."""
    out = _shape(inputs, program)
    return Cost(
        flops=float(out.numel() * len(parse(program, len(inputs)))),
        bytes=nbytes(*inputs, out),
    )


def _onnx(inputs: Sequence[Value], program: str) -> Any:
    """The steps as nodes of their own: ONNX Runtime's CPU provider has no kernel for a chain."""
    values = list(inputs)
    for name, operands in parse(program, len(inputs)):
        like = next(values[o.index] for o in reversed(operands) if isinstance(o, Operand))
        literal = name == "to" or name in _activations.ONNX  # what ONNX has as attributes
        read = [
            values[o.index] if isinstance(o, Operand) else o if literal else _constant(o, like)
            for o in operands
        ]
        values.append(FUNCTIONS[name].onnx(*read))
    return values[-1]


def _constant(number: Any, like: Value) -> Any:
    """A number in a value's type; in float64 until then, so that it is rounded once."""
    return op.CastLike(op.Constant(value=ir.tensor(float(number), dtype=ir.DataType.DOUBLE)), like)


def _samples() -> Iterator[Sample]:
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    gate = "%2 = mul(%0, %1)\n%3 = sigmoid(%2, 1.0)\n%4 = add(%3, 1)"
    yield Sample(([x, y], gate), label="a gate")
    yield Sample(([1e3 * x, y], gate), label="large magnitudes")
    yield Sample(
        ([x, torch.randn(24)], "%2 = sub(%0, %1)\n%3 = abs(%2)\n%4 = mul(2.5, %3)"), label="a vector"
    )
    curve = "%1 = square(%0)\n%2 = add(%1, 0.5)\n%3 = rsqrt(%2)\n%4 = pow(%3, 3)\n%5 = div(%4, %2)"
    yield Sample(([x], curve), label="powers")
    yield Sample(([x], "%1 = tanh(%0, 1.0)\n%2 = exp(%1)\n%3 = log(%2)\n%4 = neg(%3)"), label="functions")
    chosen = "%2 = gt(%0, 0.25)\n%3 = maximum(%0, %1)\n%4 = where(%2, %3, -1.0)"
    yield Sample(([x, y], chosen), label="a choice")
    yield Sample(([x], "%1 = to(%0, float32)\n%2 = sin(%1)\n%3 = mul(%2, %2)"), label="a cast")
    yield Sample(([torch.randn(7)], "%1 = gelu_tanh(%0, 1.0)\n%2 = leaky_relu(%1, 0.1)"), label="odd size")


def _bad_samples() -> Iterator[BadSample]:
    x = torch.randn(2, 5)
    yield BadSample(([x], ""), match="the program is empty")
    yield BadSample(([x], "%1 = exp(%0"), match="is not the step %1")
    yield BadSample(([x], "%2 = exp(%0)"), match="is not the step %1")
    yield BadSample(([x], "%1 = erfc(%0)"), match="there is no erfc of 1 operands")
    yield BadSample(([x], "%1 = exp(%1)"), match="reads what is not there yet")
    yield BadSample(([x], "%1 = add(%0, half)"), match="has no use for half")
    yield BadSample(([x], "%1 = gt(%0, 0)"), match="the result must be floating")
    yield BadSample(([x.long()], "%1 = neg(%0)"), match="must be floating or bool")
    yield BadSample(([x, x.half()], "%2 = add(%0, %1)"), match="the tensors of add are")
    yield BadSample(([x], "%1 = add(1, 2)"), match="add reads no tensor")


OP = register(Op("pointwise", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
