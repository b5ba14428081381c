"""The generator: one Triton kernel of any pointwise program, by Triton's own evaluation at compile time.

``_pointwise_kernel`` takes the program's steps as a compile-time argument and unrolls over them, so that what
is compiled holds those steps and nothing else. Between them values are float32, rounded once at the end. A
comparison sees them as torch would, rounded to the type that the program gives them; so does what follows a
cast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.kernels._activations import TORCH
from graphopt.kernels._activations_triton import activate
from graphopt.kernels._program import COMPARISONS, FUNCTIONS, Operand, parse, typed
from graphopt.kernels._triton import (
    INTERPRETED,
    compile_time,
    constant,
    jit,
    launch,
    libdevice,
    processors,
    tl,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

_NO_LIBRARY = constant(INTERPRETED)  # libdevice is machine code
_LOG2_E = constant(1.4426950408889634)
_LOG2_E_REST = constant(1.925963033500201e-08)  # what float32 leaves of it
_LN_2 = constant(0.6931471805599453)


@dataclass(frozen=True)
class _Step:
    """One step as the kernel reads it.

    Args:
        name: of the function.
        kind: "activation", "unary", "power" (of a number that products or a square root make), or the name.
        operands: for every operand, whether it is a value, and the value's place or the number.
        rounded: the type that what it reads is rounded to, or what it makes is (a cast); else empty.
    """

    name: str
    kind: str
    operands: tuple[tuple[bool, int | float], ...]
    rounded: str


@functools.lru_cache(maxsize=4096)
def _steps(program: str, given: tuple[torch.dtype, ...]) -> tuple[_Step, ...]:
    """The steps of a program whose inputs have these types."""
    dtypes = typed(program, given)
    steps = []
    for (name, operands), made in zip(parse(program, len(given)), dtypes[len(given) :], strict=True):
        own = [dtypes[o.index] for o in operands if isinstance(o, Operand)][-1]
        exact = name not in (*COMPARISONS, "where")  # which take numbers in the type of the values
        read = tuple(
            (True, o.index)
            if isinstance(o, Operand)
            else (False, o if exact else torch.tensor(o, dtype=own).item())
            for o in operands
            if not isinstance(o, str)
        )
        rounded = own if name in COMPARISONS else made if name == "to" else torch.float32
        kind = "activation" if name in TORCH else "unary" if FUNCTIONS[name].arity == 1 else name
        if name == "pow" and not read[1][0] and (read[1][1] in range(-8, 9) or abs(read[1][1]) == 0.5):
            kind = "power"
        narrow = rounded in (torch.float16, torch.bfloat16)
        steps.append(_Step(name, kind, read, str(rounded).removeprefix("torch.") if narrow else ""))
    return tuple(steps)


# What the kernel asks while it is compiled


@compile_time
def _name(steps: tuple[_Step, ...], step: int) -> str:
    return steps[step].name


@compile_time
def _kind(steps: tuple[_Step, ...], step: int) -> str:
    return steps[step].kind


@compile_time
def _rounded(steps: tuple[_Step, ...], step: int) -> str:
    return steps[step].rounded


@compile_time
def _is_value(steps: tuple[_Step, ...], step: int, which: int) -> bool:
    return which < len(steps[step].operands) and steps[step].operands[which][0]


@compile_time
def _number(steps: tuple[_Step, ...], step: int, which: int) -> int | float:
    return steps[step].operands[which][1] if which < len(steps[step].operands) else 0


# The kernel


@jit
def _operand(values, STEPS: tl.constexpr, STEP: tl.constexpr, WHICH: tl.constexpr):  # type: ignore[no-untyped-def]
    NUMBER: tl.constexpr = _number(STEPS, STEP, WHICH)
    if _is_value(STEPS, STEP, WHICH):  # noqa: SIM108 - a branch that is not taken is not compiled
        value = values[NUMBER]
    else:
        value = NUMBER
    return value


@jit
def _as(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounded to a type, and back in float32; x itself for a number, or where there is nothing to round."""
    if TYPE == "float16":
        x = x.to(tl.float16).to(tl.float32)
    elif TYPE == "bfloat16":
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@jit
def _exp(x):  # type: ignore[no-untyped-def]
    """exp(x) whose relative error does not grow with x, as that of the GPU's instruction does."""
    high = x * _LOG2_E
    rest = tl.fma(x, _LOG2_E, -high) + x * _LOG2_E_REST
    power = tl.exp2(high)
    return tl.where((power > 0) & (power < float("inf")), power + power * rest * _LN_2, power)


@jit
def _pow(x, y):  # type: ignore[no-untyped-def]
    """x ** y for two blocks of float32."""
    if _NO_LIBRARY:
        power = tl.exp2(y.to(tl.float64) * tl.log2(tl.abs(x).to(tl.float64))).to(tl.float32)
        whole = tl.floor(y) == y
        odd = whole & (tl.floor(y * 0.5) * 2 != y)
        power = tl.where(x < 0, tl.where(whole, tl.where(odd, -power, power), float("nan")), power)
        power = tl.where((y == 0) | (x == 1), 1.0, power)
    else:
        power = libdevice.pow(x, y)
    return power


@jit
def _small_power(x, EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """x ** EXPONENT by products, or the root where it is a half, as in torch."""
    if EXPONENT == 0.5:
        power = tl.sqrt_rn(x)
    elif EXPONENT == -0.5:
        power = tl.rsqrt(x)
    else:
        power = tl.full(x.shape, 1.0, tl.float32)
        for _ in tl.static_range(int(EXPONENT if EXPONENT > 0 else -EXPONENT)):
            power = power * x
        if EXPONENT < 0:
            power = 1 / power
    return power


@jit
def _of_two(a, b, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """Arithmetic, the larger and the smaller, which hand on what is not a number, and comparisons."""
    if NAME == "add":
        out = a + b
    elif NAME == "sub":
        out = a - b
    elif NAME == "mul":
        out = a * b
    elif NAME == "div":
        out = a / b
    elif NAME == "maximum":
        out = tl.where((a != a) | (a > b), a, b)
    elif NAME == "minimum":
        out = tl.where((a != a) | (a < b), a, b)
    elif NAME == "lt":
        out = a < b
    elif NAME == "le":
        out = a <= b
    elif NAME == "gt":
        out = a > b
    elif NAME == "ge":
        out = a >= b
    elif NAME == "eq":
        out = a == b
    else:
        tl.static_assert(NAME == "ne", "the function has no Triton form")
        out = a != b
    return out


@jit
def _of_one(x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    if NAME == "neg":
        x = -x
    elif NAME == "abs":
        x = tl.abs(x)
    elif NAME == "exp":
        x = _exp(x)
    elif NAME == "log":
        x = tl.log(x)
    elif NAME == "erf":
        x = tl.erf(x)
    elif NAME == "sin":
        x = tl.sin(x)
    elif NAME == "cos":
        x = tl.cos(x)
    elif NAME == "floor":
        x = tl.floor(x)
    elif NAME == "ceil":
        x = tl.ceil(x)
    elif NAME == "sqrt":
        x = tl.sqrt_rn(x)
    elif NAME == "rsqrt":
        x = tl.rsqrt(x)
    elif NAME == "reciprocal":
        x = 1 / x
    else:
        tl.static_assert(NAME == "square", "the function has no Triton form")
        x = x * x
    return x


@jit
def _step(values, STEPS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value that a step makes of those before it."""
    NAME: tl.constexpr = _name(STEPS, STEP)
    KIND: tl.constexpr = _kind(STEPS, STEP)
    ROUNDED: tl.constexpr = _rounded(STEPS, STEP)
    a = _operand(values, STEPS, STEP, 0)
    b = _operand(values, STEPS, STEP, 1)
    if KIND == "activation":
        out = activate(a, b, NAME)
    elif KIND == "unary":
        out = _of_one(a, NAME)
    elif KIND == "to":
        out = _as(a.to(tl.float32), ROUNDED)
    elif KIND == "where":
        out = tl.where(a, b, _operand(values, STEPS, STEP, 2))
    elif KIND == "power":
        out = _small_power(a, _number(STEPS, STEP, 1))
    elif KIND == "pow":
        zeros = tl.zeros(values[0].shape, tl.float32)
        out = _pow(zeros + a, zeros + b)
    else:
        if _is_value(STEPS, STEP, 0):
            a = _as(a, ROUNDED)
        if _is_value(STEPS, STEP, 1):
            b = _as(b, ROUNDED)
        out = _of_two(a, b, NAME)
    return out


@jit
def _offset(place, SIZES: tl.constexpr, STRIDES: tl.constexpr, INPUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where an input's elements lie: a stride an axis, innermost first; the outermost needs no size."""
    offset = tl.zeros_like(place)
    rest = place
    for axis in tl.static_range(len(SIZES)):
        offset += rest % SIZES[axis] * STRIDES[INPUT][axis]
        rest = rest // SIZES[axis]
    return offset + rest * STRIDES[INPUT][len(SIZES)]


@jit
def _pointwise_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    input_ptrs,
    elements,
    STEPS: tl.constexpr,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    seen = place < elements
    wait_for_inputs(PDL)
    values = ()
    for i in tl.static_range(len(STRIDES)):
        x = tl.load(input_ptrs[i] + _offset(place, SIZES, STRIDES, i), mask=seen, other=0)
        if x.dtype != tl.int1:
            x = x.to(tl.float32)
        values = values + (x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no unpacking
    for i in tl.static_range(len(STEPS)):
        values = values + (_step(values, STEPS, i),)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(out_ptr + place, values[len(STRIDES) + len(STEPS) - 1], mask=seen)


# The launcher


def refuse_program(program: str, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why the kernel cannot run a program, or None.

    Args:
        program: a good one.
        dtypes: of its inputs.
    """
    every = typed(program, dtypes)
    if torch.float64 in every:
        return "the program computes in float64, and the kernel in float32"
    for name, operands in parse(program, len(dtypes)):
        values = [every[operand.index] for operand in operands if isinstance(operand, Operand)]
        if name in TORCH and len(values) > 1:
            return f"the parameter of {name} is a tensor"
        read = values[1:] if name == "where" else values
        if torch.bool in read and name not in ("to", "eq", "ne"):
            return f"{name} reads booleans"
    return None


def run(inputs: Sequence[torch.Tensor], program: str) -> torch.Tensor:
    """Launch the kernel; what ``refuse_program`` refuses must not come here."""
    dtypes = tuple(x.dtype for x in inputs)
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    out = inputs[0].new_empty(shape, dtype=typed(program, dtypes)[-1])
    elements = out.numel()
    sizes, strides = merged_axes(shape, [x.expand(shape).stride() for x in inputs])
    furthest = max(
        elements,
        *(sum((n - 1) * s for n, s in zip(shape, x.expand(shape).stride(), strict=True)) for x in inputs),
    )
    key = (elements, program, dtypes, sizes, strides)
    config = choose(_pointwise_kernel, out.device, key, _configs(elements, out.device))
    grid = (-(-elements // config.tiles["BLOCK"]),)
    constants: dict[str, Any] = {"STEPS": _steps(program, dtypes), "SIZES": sizes, "STRIDES": strides}
    wide = furthest >= 2**31 - 2**16  # with room for the last block's end
    launch(_pointwise_kernel, grid, out, tuple(inputs), elements, **constants, WIDE=wide, **config.options)
    return out


def merged_axes(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The fewest axes that walk all inputs, innermost first.

    Args:
        shape: of the result.
        strides: of every input, expanded to it.

    Returns:
        The axes' sizes, but for the outermost's; for every input its stride on each axis.
    """
    axes: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in zip(reversed(shape), reversed(list(zip(*strides, strict=True))), strict=True):
        if size == 1:
            continue
        if axes and all(step == axes[-1][0] * inner for step, inner in zip(steps, axes[-1][1], strict=True)):
            axes[-1] = (axes[-1][0] * size, axes[-1][1])
        else:
            axes.append((size, steps))
    if not axes:
        axes = [(1, (0,) * len(strides))]
    sizes = tuple(size for size, _ in axes[:-1])
    return sizes, tuple(zip(*(steps for _, steps in axes), strict=True))


def _configs(elements: int, device: torch.device) -> list[Config]:
    """Two loads of 16 bytes a thread in half precision, fewer where that leaves processors without work."""
    small = elements < 2048 * 2 * processors(device)
    first = Config({"BLOCK": 512 if small else 2048}, 4)
    others = [Config({"BLOCK": 128 * warps * each}, warps) for warps in (2, 4, 8) for each in (1, 2, 4)]
    return [first, *(config for config in others if config != first)]
