"""The relations between dynamic sizes that capture relied on, as a check of later inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from graphopt.capture.inputs import Leaf

_SCOPE = {**SYMPY_INTERP, "math": math, "__builtins__": {"abs": abs, "max": max, "min": min}}


def size_guards(lines: Sequence[str], tensors: Sequence[Leaf]) -> Callable[..., None] | None:
    """A function of the flat tensors that raises ``AssertionError`` when a relation does not hold.

    Args:
        lines: Python expressions over sizes, as ``torch.export`` writes them: ``L['x'].size()[0] <= 16``.
        tensors: the leaves that are tensors, in order.

    Returns:
        The function; None when there is no relation to check.
    """
    guards: list[tuple[str, CodeType]] = []
    for line in lines:
        if ".size()" in line:
            code = line
            for index, leaf in enumerate(tensors):
                code = code.replace(f"{leaf.source}.size()", f"shapes[{index}]")
            guards.append((in_words(line, tensors), compile(code, "<guard>", "eval")))
    if not guards:
        return None
    held: set[Any] = set()

    def check(*given: torch.Tensor) -> None:
        shapes = tuple(tuple(tensor.shape) for tensor in given)
        if shapes in held:
            return
        for words, guard in guards:
            if not eval(guard, _SCOPE, {"shapes": shapes}):  # noqa: S307 (the code is torch.export's own)
                raise AssertionError(words)
        if len(held) < _REMEMBERED:
            held.add(shapes)

    return check


_REMEMBERED = 1024  # combinations of sizes: a call of known sizes costs a look-up


def in_words(text: str, tensors: Sequence[Leaf]) -> str:
    """A text of ``torch.export`` with the user's names of tensors, and sizes as ``x.shape[0]``."""
    for leaf in sorted(tensors, key=lambda leaf: -len(leaf.source)):
        text = text.replace(leaf.source, leaf.path)
    return re.sub(r"\.size\(\)\[", ".shape[", text)
