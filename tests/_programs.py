"""Random programs: models drawn by Hypothesis as Python source, so that a failing one can be read and run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

from tests._builder import SEQ, WIDTH, B, Builder, Dims, S, Value
from tests._recipes import RECIPES

_SOURCE = '''\
import torch
from torch import nn
from torch.nn import functional as F

DTYPE = torch.{dtype}


def weight(draw, *shape):
    """Of order 1; vectors are positive, as scales and variances are."""
    if len(shape) == 1:
        return nn.Parameter(torch.rand(shape, generator=draw).add(0.5).to(DTYPE), requires_grad=False)
    fan_in = torch.Size(shape[1:]).numel()
    value = torch.randn(shape, generator=draw) * fan_in**-0.5
    return nn.Parameter(value.to(DTYPE), requires_grad=False)


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed({seed})
{weights}

    def forward(self, {parameters}):
{body}
        return {returned}


def inputs(batch, seq, seed):
    draw = torch.Generator().manual_seed(seed)
{inputs}
    return {arguments}


DYNAMIC = {dynamic}
FINITE = {finite}
'''
_INPUTS = {
    "x": ((B, S, WIDTH), "float", "torch.randn(batch, seq, 8, generator=draw).to(DTYPE)"),
    "y": ((B, S, WIDTH), "float", "torch.randn(batch, seq, 8, generator=draw).to(DTYPE)"),
    "image": ((B, 4, 6, 6), "float", "torch.randn(batch, 4, 6, 6, generator=draw).to(DTYPE)"),
    "ids": ((B, S), "int", "torch.randint(0, 7, (batch, seq), generator=draw)"),
    "mask": (
        (B, S),
        "bool",
        "torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1), generator=draw)",
    ),
    "keep": ((B, S), "bool", "torch.rand(batch, seq, generator=draw) > 0.4"),
}


_HARMLESS, _SPECIAL = ("", "", "zeros"), ("nan", "inf", "-inf")


@st.composite
def programs(draw: Any) -> str:
    """The source of a module with a class ``Program``, ``inputs``, ``DYNAMIC`` and ``FINITE``."""
    dtype = draw(st.sampled_from(("float32", "float32", "float32", "float64", "bfloat16")))
    special = draw(st.sampled_from(_HARMLESS * 4 + _SPECIAL))
    taken = ["x", *(name for name in _INPUTS if name != "x" and draw(st.booleans()))]
    dynamic = draw(st.sampled_from(((), (), (), ("batch",), ("batch", "seq"))))
    seq, length = (S, "x.shape[1]") if "seq" in dynamic else (SEQ, str(SEQ))
    p = Builder(draw, special == "zeros", seq, length)
    p.values = [Value(name, _sizes(_INPUTS[name][0], seq), _INPUTS[name][1]) for name in taken]
    for recipe in draw(st.lists(st.sampled_from(RECIPES), min_size=2, max_size=9)):
        recipe(p)
    made = ["        " + line for weight in p.weights for line in weight.splitlines()]
    given = [f"    {name} = {_INPUTS[name][2]}" for name in taken]
    if special in _SPECIAL:
        given.append(f'    x[0, 1, 2] = float("{special}")')
    return _SOURCE.format(
        dtype=dtype,
        seed=draw(st.integers(0, 3)),
        weights="\n".join(made),
        parameters=", ".join(taken),
        body="\n".join(f"        {name} = {text}" for name, text in p.lines) or "        pass",
        returned=_returned(draw, p),
        inputs="\n".join(given),
        finite=special not in _SPECIAL,
        arguments=f"({', '.join(taken)},)",
        dynamic={name: _named(_INPUTS[name][0], dynamic) for name in taken} if dynamic else None,
    )


def _sizes(dims: Dims, seq: Any) -> Dims:
    return tuple(seq if size == S else size for size in dims)


def _named(dims: Dims, dynamic: tuple[str, ...]) -> dict[int, str]:
    names = {B: "batch", S: "seq"}
    return {place: names[size] for place, size in enumerate(dims) if names.get(size) in dynamic}


def _returned(draw: Any, p: Builder) -> str:
    """The last value and a few more; perhaps one twice, an input, or a view of one."""
    names = [value.name for value in p.values]
    chosen = [names[-1], *draw(st.lists(st.sampled_from(names), max_size=2))]
    chosen += draw(st.sampled_from(((), (), (), (chosen[0],), ("x",), ("x.transpose(1, 2)",))))
    if draw(st.integers(0, 4)) == 0:
        return "{" + ", ".join(f'"{index}": {name}' for index, name in enumerate(chosen)) + "}"
    return chosen[0] if len(chosen) == 1 else ", ".join(chosen)


def load(source: str, folder: Path) -> ModuleType:
    """The program as a module, from a file: rewrites then know their line in it."""
    path = folder / "program.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
