"""A chain of pointwise steps and reductions of rows as one op, whose program a generator makes one kernel of.

    out = program(inputs), for example out = sigmoid(a * b) + 1 as

    %2 = mul(%0, %1)
    %3 = sigmoid(%2)
    %4 = add(%3, 1.0)

A program is a step a line; ``%0`` and those after it are the inputs, then the steps. A step is a name below
of values, numbers and, for ``to``, a type. A step's tensors have one type, but for ``where``'s condition.

With ``dims`` steps may also take a value's last ``dims`` dimensions together: ``sum``, ``mean``, ``amax``,
``amin``, ``prod``, ``norm`` (in 2-norm), ``softmax`` and ``log_softmax``. What they read has the whole shape
that all inputs broadcast to, and the dimensions stay, at size 1, so that later steps may read both: the
distance from the mean is

    %1 = mean(%0)
    %2 = sub(%0, %1)

The kernel adds up rows in float32, on 32 threads or more: of a row with n elements at most n / 32 + 10
roundings follow one another, so that a sum is within (n / 32 + 10) * 2**-24 * sum(abs(x)) (Higham: The
accuracy of floating point summation, 1993), and is rounded to the result's type once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.graph import same_shape
from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels import _activations, _pointwise_triton, _reduction_triton
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._program import FUNCTIONS, REDUCTIONS, Operand, parse, shaped, typed
from graphopt.kernels._shape import nbytes, require
from graphopt.kernels._triton import refuse

SCHEMA = "(Tensor[] inputs, str program, int dims=0, bool keepdim=True) -> Tensor"


def _shape(inputs: Sequence[torch.Tensor], program: str, dims: int = 0, keepdim: bool = True) -> torch.Tensor:
    """The shape rule.

    Args:
        inputs: of shapes that broadcast, floating or bool.
        program: see above.
        dims: how many last dimensions its reductions are over; 0 for a program without any.
        keepdim: False leaves these dimensions out of a result in which they have size 1.

    Returns:
        An empty tensor of the last step's type; of the broadcast shape, but for a program with reductions
        that ends in a value of each row.

    Raises:
        ValueError: the program is none, the types of a step's tensors differ, or a reduction does not read
            whole rows.
    """
    for x in inputs:
        fits = x.dtype.is_floating_point or x.dtype == torch.bool
        require(fits, f"pointwise: inputs must be floating or bool, not {x.dtype}")
    dtypes = typed(program, [x.dtype for x in inputs])
    require(dtypes[-1].is_floating_point, f"pointwise: the result must be floating, not {dtypes[-1]}")
    shapes = [x.shape for x in inputs]
    whole = tuple(torch.broadcast_shapes(*shapes))
    require(0 <= dims <= len(whole), f"pointwise: there are no {dims} last dimensions of {len(whole)}")
    made = shaped(program, shapes, dims)[-1]
    lead = whole[: len(whole) - dims]
    of_rows = same_shape(made, (*lead, *(1,) * dims))
    require(of_rows or same_shape(made, whole), f"pointwise: the result has shape {made}, rows {whole}")
    require(keepdim or of_rows, f"pointwise: the result has whole rows, {made}, and keepdim is False")
    return inputs[0].new_empty(made if keepdim else lead, dtype=dtypes[-1])


def _reference(
    inputs: Sequence[torch.Tensor], program: str, dims: int = 0, keepdim: bool = True
) -> torch.Tensor:
    values, axes = list(inputs), tuple(range(-dims, 0))
    for name, operands in parse(program, len(inputs)):
        read = [values[o.index] if isinstance(o, Operand) else o for o in operands]
        made = REDUCTIONS[name].torch(*read, axes) if name in REDUCTIONS else FUNCTIONS[name].torch(*read)
        values.append(made)
    return (values[-1] if keepdim else values[-1].squeeze(axes)).contiguous()


def _cost(inputs: Sequence[torch.Tensor], program: str, dims: int = 0, keepdim: bool = True) -> Cost:
    """An operation a step and element of the rows."""
    whole = torch.broadcast_shapes(*(x.shape for x in inputs))
    return Cost(
        flops=float(math.prod(whole) * len(parse(program, len(inputs)))),
        bytes=nbytes(*inputs, _shape(inputs, program, dims, keepdim)),
    )


def _launch(
    inputs: Sequence[torch.Tensor], program: str, dims: int = 0, keepdim: bool = True
) -> torch.Tensor:
    if dims:
        return _reduction_triton.run(inputs, program, dims, keepdim)
    return _pointwise_triton.run(inputs, program)


def _refuses(inputs: Sequence[torch.Tensor], program: str, dims: int = 0, keepdim: bool = True) -> str | None:
    whole = torch.broadcast_shapes(*(x.shape for x in inputs))
    if 0 in whole[len(whole) - dims :]:
        return "rows have no elements"
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


def _onnx(inputs: Sequence[Value], program: str, dims: int = 0, keepdim: bool = True) -> Any:
    """The steps as nodes of their own: ONNX Runtime's CPU provider has no kernel for a chain."""
    values, axes = list(inputs), list(range(-dims, 0))
    for name, operands in parse(program, len(inputs)):
        if name in REDUCTIONS:
            (source,) = (values[o.index] for o in operands if isinstance(o, Operand))
            values.append(REDUCTIONS[name].onnx(source, axes))
            continue
        like = next(values[o.index] for o in reversed(operands) if isinstance(o, Operand))
        literal = name == "to" or name in _activations.ONNX  # what ONNX has as attributes
        read = [
            values[o.index] if isinstance(o, Operand) else o if literal else _constant(o, like)
            for o in operands
        ]
        values.append(FUNCTIONS[name].onnx(*read))
    return values[-1] if keepdim else op.Squeeze(values[-1], op.Constant(value_ints=axes))


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
    yield from _row_samples()


def _row_samples() -> Iterator[Sample]:
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    gate = "%2 = mul(%0, %1)\n%3 = sigmoid(%2, 1.0)\n%4 = sum(%3)"
    yield Sample(([x, y], gate, 1), label="sums of a gate")
    yield Sample(([x, y], gate, 1, False), label="sums without the dimension")
    yield Sample(([1e2 * x, y], gate, 2, False), label="sums over two dimensions")
    centred = "%1 = mean(%0)\n%2 = sub(%0, %1)\n%3 = square(%2)\n%4 = mean(%3)\n%5 = add(%4, 1e-05)"
    yield Sample(([x + 3], f"{centred}\n%6 = sqrt(%5)\n%7 = div(%2, %6)", 1), label="means of two levels")
    unit = "%1 = norm(%0)\n%2 = maximum(%1, 1e-12)\n%3 = div(%0, %2)"
    yield Sample(([torch.randn(3, 7)], unit, 1), label="unit vectors")
    yield Sample(([1e3 * x], unit, 1), label="long vectors")
    scores = "%3 = mul(%0, 0.125)\n%4 = where(%1, %3, -10000.0)\n%5 = add(%4, %2)\n%6 = softmax(%5)"
    seen, bias = torch.rand(2, 1, 24) < 0.7, torch.randn(5, 1)
    yield Sample(([x, seen, bias], scores, 1), label="a softmax of masked scores")
    yield Sample(([4 * x], "%1 = log_softmax(%0)\n%2 = neg(%1)", 1), label="a log_softmax")
    spread = "%2 = abs(%0)\n%3 = amax(%2)\n%4 = amin(%2)\n%5 = sub(%3, %4)\n%6 = mul(%5, %1)"
    yield Sample(([x, torch.rand(5, 1)], spread, 1), label="extremes, a factor a row")
    product = "%1 = tanh(%0, 1.0)\n%2 = add(%1, 1.5)\n%3 = prod(%2)"
    yield Sample(([torch.randn(3, 2, 5)], product, 2), label="products over two dimensions")
    yield Sample(([torch.randn(13)], "%1 = exp(%0)\n%2 = mean(%1)", 1, False), label="one row")


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
    yield BadSample(([x], "%1 = sum(%0)"), match="sum is over 0 dimensions of 2")
    yield BadSample(([x], "%1 = sum(%0)", 3), match="there are no 3 last dimensions of 2")
    yield BadSample(([x], "%1 = softmax(%0)", 2), match="softmax is over one dimension, not 2")
    rows = "%2 = sum(%1)\n%3 = add(%0, %2)"
    yield BadSample(([x, x[:, :1]], rows, 1), match=r"sum reads \(2, 1\), but whole rows are of \(2, 5\)")
    yield BadSample(([x], "%1 = gt(%0, 0)\n%2 = sum(%1)", 1), match="sum reads torch.bool")
    yield BadSample(([x, x[:1]], "%2 = exp(%1)", 1), match="the result has shape")
    yield BadSample(([x], "%1 = softmax(%0)", 1, False), match="whole rows, .*, and keepdim is False")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("pointwise", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
