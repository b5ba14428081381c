"""A random program while it is drawn: values that fit, statements, weights.

Sizes are small and differ, so that no two agree by accident; ``B`` is the batch and ``S`` the length
of a sequence, where they may be dynamic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

B, S, SEQ, WIDTH, HEADS, HEAD = "B", "S", 5, 8, 2, 4
Dims = tuple[Any, ...]


@dataclass(frozen=True)
class Value:
    """What a name in the program stands for: its sizes, and whether it holds floats, ints or bools."""

    name: str
    dims: Dims
    kind: str = "float"

    def __str__(self) -> str:
        return self.name


@dataclass
class Builder:
    """A program as far as it is drawn."""

    draw: Callable[..., Any]
    zeros: bool
    seq: Any  # the length of sequences in dims: a number, or S where it is dynamic
    length: str  # and as text
    values: list[Value] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    names: Any = field(default_factory=itertools.count)

    def one_of(self, *choices: Any) -> Any:
        """One of some texts (or anything)."""
        return self.draw(st.sampled_from(choices))

    def pick(self, *dims: Any, rank: int = 0, kind: str = "float") -> Value | None:
        """A value of these sizes (None: any), or of this rank; recent ones are likelier."""
        fitting = [
            value
            for value in self.values
            if value.kind == kind
            and (not rank or len(value.dims) == rank)
            and (not dims or len(value.dims) == len(dims))
            and all(want in (None, have) for want, have in zip(dims, value.dims, strict=False))
        ]
        return self.draw(st.sampled_from(fitting[::-1])) if fitting else None

    def emit(self, expression: str, dims: Sequence[Any], kind: str = "float") -> Value:
        """A statement; returns what it gives, which later recipes may pick."""
        value = Value(f"v{next(self.names)}", tuple(dims), kind)
        self.lines.append((value.name, expression))
        self.values.append(value)
        return value

    def let(self, expression: str) -> str:
        """A statement whose value only the recipe itself reads."""
        name = f"v{next(self.names)}"
        self.lines.append((name, expression))
        return name

    def weight(self, *shape: int) -> str:
        """A parameter; some rows of it may be exactly zero."""
        name = f"w{len(self.weights)}"
        line = f"self.{name} = weight(draw, {', '.join(map(str, shape))})"
        if self.zeros and len(shape) > 1 and self.draw(st.booleans()):
            line += f"\nself.{name}[{self.one_of('::2', ':3', ':, ::2', '1:2')}] = 0"
        self.weights.append(line)
        return f"self.{name}"

    def constant(self, expression: str) -> str:
        """A buffer; where the sizes of sequences are dynamic, a statement."""
        if self.seq == S:
            return self.let(expression)
        name = f"w{len(self.weights)}"
        self.weights.append(f'self.register_buffer("{name}", {expression})')
        return f"self.{name}"


def product(p: Builder, x: str, before: int, after: int, bias: bool) -> str:
    """An expression for x @ W (+ b)."""
    spelling = p.one_of("linear", "linear", "matmul", "transposed", "einsum")
    w = p.weight(before, after) if spelling == "matmul" else p.weight(after, before)
    b = p.weight(after) if bias else ""
    if spelling == "linear":
        return f"F.linear({x}, {w}{', ' + b if bias else ''})"
    text = {
        "matmul": f"torch.matmul({x}, {w})",
        "transposed": f"({x} @ {w}.t())",
        "einsum": f'torch.einsum("...i,oi->...o", {x}, {w})',
    }[spelling]
    return f"({text} + {b})" if bias else text
