"""A chain of pointwise steps as one op, whose program a generator makes one kernel of.

    out = program(inputs), for example out = sigmoid(a * b) + 1 as

    %2 = mul(%0, %1)
    %3 = sigmoid(%2)
    %4 = add(%3, 1.0)

A program is a step a line; ``%0`` and those after it are the inputs, then the steps. A step is a name below
of values, numbers and, for ``to``, a type. A step's tensors have one type, but for ``where``'s condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels import _activations, _pointwise_triton
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._program import FUNCTIONS, Operand, parse, typed
from graphopt.kernels._shape import nbytes, require
from graphopt.kernels._triton import refuse

SCHEMA = "(Tensor[] inputs, str program) -> Tensor"


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
    for x in inputs:
        fits = x.dtype.is_floating_point or x.dtype == torch.bool
        require(fits, f"pointwise: inputs must be floating or bool, not {x.dtype}")
    dtypes = typed(program, [x.dtype for x in inputs])
    require(dtypes[-1].is_floating_point, f"pointwise: the result must be floating, not {dtypes[-1]}")
    return inputs[0].new_empty(torch.broadcast_shapes(*(x.shape for x in inputs)), dtype=dtypes[-1])


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


def _launch(inputs: Sequence[torch.Tensor], program: str) -> torch.Tensor:
    return _pointwise_triton.run(inputs, program)


def _refuses(inputs: Sequence[torch.Tensor], program: str) -> str | None:
    return _pointwise_triton.refuse_program(program, [x.dtype for x in inputs]) or refuse(*inputs)


def unary(program: Callable[..., str]) -> TritonFace:
    """The face of a call on one tensor that is one step.

    Args:
        program: the step as text, from the call's arguments: ``lambda x: "silu(%0, 1.0)"``.
    """

    def launch(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _launch([x], f"%1 = {program(x, *args, **kwargs)}")

    def refuses(x: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
        return _refuses([x], f"%1 = {program(x, *args, **kwargs)}")

    return TritonFace(launch, refuses)


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


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("pointwise", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
