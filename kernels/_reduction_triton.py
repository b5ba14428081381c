"""The generator for programs with reductions: one Triton kernel that takes whole rows.

A row that fits into a program's registers is read once. A longer one is read in blocks, once for every level
of its reductions (a softmax has two, the maximum and the sum that needs it) and once more where the result
has whole rows; all but the first time from the L2 cache, where the rows of the programs that run fit into it.
Values of whole rows are tiles (R, D) and those of a row tiles (R, 1), all in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from graphopt.kernels._pointwise_triton import (
    ProgramStep,
    is_wide,
    kind_of,
    load,
    made_by,
    merged_axes,
    name_of,
    offset_of,
    operand_of,
    steps_of,
)
from graphopt.kernels._program import Operand, parse, shaped, typed
from graphopt.kernels._rows import LONGEST, power_of_two, row_configs
from graphopt.kernels._triton import compile_time, jit, launch, tl, wait_for_all, wait_for_inputs
from graphopt.kernels._tuning import Config, choose

# What the kernel has no step for: {} is what is read, {n} the step n of these, {row} the row's length.
_PARTS: dict[str, tuple[str, ...]] = {
    "mean": ("sum({})", "div({0}, {row})"),
    "norm": ("square({})", "sum({0})", "sqrt({1})"),
    "softmax": ("amax({})", "sub({}, {0})", "exp({1})", "sum({2})", "div({2}, {3})"),
    "log_softmax": ("amax({})", "sub({}, {0})", "exp({1})", "sum({2})", "log({3})", "sub({1}, {4})"),
}


@functools.lru_cache(maxsize=4096)
def taken_apart(program: str, inputs: int, row: int) -> str:
    """A program with no reductions but sum, amax, amin and prod.

    Args:
        program: a good one.
        inputs: how many it has.
        row: elements of a row.
    """
    lines: list[str] = []
    names = [f"%{index}" for index in range(inputs)]  # of the program's values in what is written

    def write(call: str) -> str:
        name = f"%{inputs + len(lines)}"
        lines.append(f"{name} = {call}")
        return name

    for name, operands in parse(program, inputs):
        read = [names[o.index] if isinstance(o, Operand) else str(o) for o in operands]
        if name not in _PARTS:
            names.append(write(f"{name}({', '.join(read)})"))
            continue
        parts: list[str] = []
        for part in _PARTS[name]:
            parts.append(write(part.replace("{}", read[0]).format(*parts, row=row)))
        names.append(parts[-1])
    return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def levels_of(
    steps: tuple[ProgramStep, ...], inputs: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """In which turn over a row each step can be made, and the reductions of every turn.

    A step that reads a reduction of one turn can be made in the next, the reduction being known then.

    Args:
        steps: of a program that is taken apart.
        inputs: how many it has.

    Returns:
        The turn of each step, and by turn the places of its reductions among the steps.
    """
    after = [0] * inputs  # the first turn in which a value can be read
    levels = []
    for step in steps:
        level = max(after[int(place)] for is_value, place in step.operands if is_value)
        levels.append(level)
        after.append(level + (step.kind == "reduction"))
    reductions = [(level, place) for place, level in enumerate(levels) if steps[place].kind == "reduction"]
    last = max(level for level, _ in reductions)
    turns = tuple(tuple(p for level, p in reductions if level == turn) for turn in range(last + 1))
    return tuple(levels), turns


# What the kernel asks while it is compiled


@compile_time
def _is_of_rows(strides: tuple[tuple[int, ...], ...], which: int) -> bool:
    """Whether an input has one value a row: it has no stride inside of one."""
    return not any(strides[which])


@compile_time
def _count(reductions: tuple[tuple[int, ...], ...], turn: int) -> int:
    return len(reductions[turn])


@compile_time
def _place(reductions: tuple[tuple[int, ...], ...], turn: int, which: int) -> int:
    return reductions[turn][which]


@compile_time
def _known(reductions: tuple[tuple[int, ...], ...], step: int) -> int:
    """The place of a reduction among all, in the order in which they are made."""
    return [place for turn in reductions for place in turn].index(step)


@compile_time
def _level(levels: tuple[int, ...], step: int) -> int:
    return levels[step]


@compile_time
def _of_nothing(name: str) -> float:
    """What a reduction makes of no elements."""
    return {"sum": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}[name]


# The kernel


@jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.where((a != a) | (a > b), a, b)


@jit
def _smaller(a, b):  # type: ignore[no-untyped-def]
    return tl.where((a != a) | (a < b), a, b)


@jit
def _product(a, b):  # type: ignore[no-untyped-def]
    return a * b


@jit
def _joined(total, x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two tiles, element by element; what is not a number is handed on, as in torch."""
    if NAME == "sum":
        total = total + x
    elif NAME == "amax":
        total = _larger(total, x)
    elif NAME == "amin":
        total = _smaller(total, x)
    else:
        tl.static_assert(NAME == "prod", "the reduction has no Triton form")
        total = total * x
    return total


@jit
def _over_rows(x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """(R, D) as (R, 1)."""
    if NAME == "sum":
        x = tl.sum(x, axis=1, keep_dims=True)
    elif NAME == "amax":
        x = tl.reduce(x, 1, _larger, keep_dims=True)
    elif NAME == "amin":
        x = tl.reduce(x, 1, _smaller, keep_dims=True)
    else:
        x = tl.reduce(x, 1, _product, keep_dims=True)
    return x


@jit
def _joined_step(total, values, seen, STEPS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A reduction's total so far and what it reads of a block, element by element."""
    NAME: tl.constexpr = name_of(STEPS, STEP)
    x = tl.where(seen, operand_of(values, STEPS, STEP, 0), _of_nothing(NAME))
    return _joined(total, x, NAME)


@jit
def _read(  # type: ignore[no-untyped-def]
    input_ptrs,
    row,
    column,
    rows,
    SIZES_R: tl.constexpr,
    STRIDES_R: tl.constexpr,
    SIZES_D: tl.constexpr,
    STRIDES_D: tl.constexpr,
    D: tl.constexpr,
):
    """The inputs at rows (R, 1) and columns (1, D); of what has one value a row, (R, 1)."""
    values = ()
    for i in tl.static_range(len(STRIDES_R)):
        ptr = input_ptrs[i] + offset_of(row, SIZES_R, STRIDES_R, i)
        if _is_of_rows(STRIDES_D, i):
            x = load(ptr, 0, row < rows)
        else:
            x = load(ptr, offset_of(column, SIZES_D, STRIDES_D, i), (row < rows) & (column < D))
        values = values + (x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no unpacking
    return values


@jit
def _in_whole_rows(values, seen, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inputs' values and those of all steps, where a block holds all of a row."""
    for i in tl.static_range(len(STEPS)):
        if kind_of(STEPS, i) == "reduction":
            x = tl.where(seen, operand_of(values, STEPS, i, 0), _of_nothing(name_of(STEPS, i)))
            made = _over_rows(x, name_of(STEPS, i))
        else:
            made = made_by(values, STEPS, i)
        values = values + (made,)  # noqa: RUF005
    return values


@jit
def _in_turn(  # type: ignore[no-untyped-def]
    values,
    done,
    STEPS: tl.constexpr,
    LEVELS: tl.constexpr,
    REDUCTIONS: tl.constexpr,
    TURN: tl.constexpr,
):
    """The inputs' values and those of all steps that can be made in a turn; others are not read."""
    for i in tl.static_range(len(STEPS)):
        if _level(LEVELS, i) > TURN:
            made = values[0]
        elif kind_of(STEPS, i) != "reduction":
            made = made_by(values, STEPS, i)
        elif _level(LEVELS, i) < TURN:
            made = done[_known(REDUCTIONS, i)]
        else:
            made = values[0]
        values = values + (made,)  # noqa: RUF005
    return values


@jit
def _turn(  # type: ignore[no-untyped-def]
    input_ptrs,
    done,
    row,
    rows,
    STEPS: tl.constexpr,
    LEVELS: tl.constexpr,
    REDUCTIONS: tl.constexpr,
    TURN: tl.constexpr,
    SIZES_R: tl.constexpr,
    STRIDES_R: tl.constexpr,
    SIZES_D: tl.constexpr,
    STRIDES_D: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The reductions of a turn over the rows, block by block."""
    totals = ()
    for i in tl.static_range(_count(REDUCTIONS, TURN)):
        start = _of_nothing(name_of(STEPS, _place(REDUCTIONS, TURN, i)))
        totals = totals + (tl.full((BLOCK_R, BLOCK_D), start, tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)[None, :]
        if row.dtype == tl.int64:
            column = column.to(tl.int64)
        values = _read(input_ptrs, row, column, rows, SIZES_R, STRIDES_R, SIZES_D, STRIDES_D, D)
        values = _in_turn(values, done, STEPS, LEVELS, REDUCTIONS, TURN)
        seen = (row < rows) & (column < D)
        joined = ()
        for i in tl.static_range(_count(REDUCTIONS, TURN)):
            total = _joined_step(totals[i], values, seen, STEPS, _place(REDUCTIONS, TURN, i))
            joined = joined + (total,)  # type: ignore[assignment]  # noqa: RUF005
        totals = joined
    for i in tl.static_range(_count(REDUCTIONS, TURN)):
        done = done + (_over_rows(totals[i], name_of(STEPS, _place(REDUCTIONS, TURN, i))),)  # noqa: RUF005
    return done


@jit
def _reduction_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    input_ptrs,
    rows,
    STEPS: tl.constexpr,
    LEVELS: tl.constexpr,
    REDUCTIONS: tl.constexpr,
    SIZES_R: tl.constexpr,
    STRIDES_R: tl.constexpr,
    SIZES_D: tl.constexpr,
    STRIDES_D: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    LAST: tl.constexpr = len(STRIDES_R) + len(STEPS) - 1
    wait_for_inputs(PDL)
    if BLOCK_D >= D:
        seen = (row < rows) & (column < D)
        values = _read(input_ptrs, row, column, rows, SIZES_R, STRIDES_R, SIZES_D, STRIDES_D, D)
        values = _in_whole_rows(values, seen, STEPS)
        if WHOLE:
            out = tl.broadcast_to(values[LAST], (BLOCK_R, BLOCK_D))
            tl.store(out_ptr + row * D + column, out, mask=seen)
        else:
            tl.store(out_ptr + row, values[LAST], mask=row < rows)
    else:
        done = ()
        for turn in tl.static_range(len(REDUCTIONS)):
            done = _turn(
                input_ptrs,
                done,
                row,
                rows,
                STEPS,
                LEVELS,
                REDUCTIONS,
                turn,
                SIZES_R,
                STRIDES_R,
                SIZES_D,
                STRIDES_D,
                D,
                BLOCK_R,
                BLOCK_D,
            )
        if WHOLE:
            for first in range(0, D, BLOCK_D):
                values = _read(
                    input_ptrs, row, first + column, rows, SIZES_R, STRIDES_R, SIZES_D, STRIDES_D, D
                )
                values = _in_turn(values, done, STEPS, LEVELS, REDUCTIONS, len(REDUCTIONS))
                seen = (row < rows) & (first + column < D)
                out = tl.broadcast_to(values[LAST], (BLOCK_R, BLOCK_D))
                tl.store(out_ptr + row * D + first + column, out, mask=seen)
        else:
            values = _read(
                input_ptrs, row, tl.zeros_like(row), rows, SIZES_R, STRIDES_R, SIZES_D, STRIDES_D, D
            )
            values = _in_turn(values, done, STEPS, LEVELS, REDUCTIONS, len(REDUCTIONS))
            tl.store(out_ptr + row, values[LAST], mask=row < rows)


# The launcher


def run(inputs: Sequence[torch.Tensor], program: str, dims: int, keepdim: bool) -> torch.Tensor:
    """Launch the kernel; what the op refuses must not come here."""
    dtypes = tuple(x.dtype for x in inputs)
    shapes = [x.shape for x in inputs]
    shape = torch.broadcast_shapes(*shapes)
    lead, inner = shape[: len(shape) - dims], shape[len(shape) - dims :]
    rows, length = math.prod(lead), math.prod(inner)
    made = torch.Size(shaped(program, shapes, dims)[-1])
    out = inputs[0].new_empty(made if keepdim else lead, dtype=typed(program, dtypes)[-1])
    expanded = [x.expand(shape).stride() for x in inputs]
    row_sizes, row_strides = merged_axes(lead, [strides[: len(lead)] for strides in expanded])
    sizes, strides = merged_axes(inner, [strides[len(lead) :] for strides in expanded])
    plain = taken_apart(program, len(inputs), length)
    steps = steps_of(plain, dtypes)
    levels, reductions = levels_of(steps, len(inputs))
    key = (rows, length, program, dims, dtypes, row_sizes, row_strides, sizes, strides)
    config = choose(_reduction_kernel, out.device, key, _configs(rows, length, out.device, len(inputs)))
    launch(
        _reduction_kernel,
        (-(-rows // config.tiles["BLOCK_R"]),),
        out,
        tuple(inputs),
        rows,
        STEPS=steps,
        LEVELS=levels,
        REDUCTIONS=reductions,
        SIZES_R=row_sizes,
        STRIDES_R=row_strides,
        SIZES_D=sizes,
        STRIDES_D=strides,
        WHOLE=made == shape,
        WIDE=is_wide(shape, inputs),
        D=length,
        **config.options,
    )
    return out


def _configs(rows: int, length: int, device: torch.device, inputs: int) -> Sequence[Config]:
    """Whole rows where the registers hold one of each input and one of what is made; else blocks of rows."""
    if power_of_two(length) * (inputs + 1) <= LONGEST:
        return row_configs(rows, length, device, inputs)
    return [
        Config({"BLOCK_R": 1, "BLOCK_D": block}, warps)
        for block, warps in ((2048, 8), (4096, 8), (2048, 4), (4096, 16), (8192, 16))
    ]
