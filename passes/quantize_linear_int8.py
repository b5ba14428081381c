"""activation(linear(x, w, b)) -> dynamic_quantized_linear(x, w8, scale, b, activation)."""

from __future__ import annotations

from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Match
from graphopt.kernels.dynamic_quantized_linear import OP as DYNAMIC_QUANTIZED_LINEAR
from graphopt.passes._projections import (
    Projection,
    largest_code,
    matches,
    rebuild,
    refuse,
    rows_in_int8,
    source,
)

_MIN_WEIGHTS = 4096


def check(match: Match) -> str | None:
    """The weights are constants of some size, in float32 on the CPU, and nothing is added behind them."""
    return refuse(match, _MIN_WEIGHTS, "quantizing the input would take as long")


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Round the weight to a scale for each output; the input is quantized at each call."""

    def make(one: Projection) -> fx.Node:
        weight = match.graph.constant(one.weight)
        assert weight is not None
        codes, scale = rows_in_int8(weight, largest_code())
        made = (
            rewriter.constant(codes, [one.weight], "in int8"),
            rewriter.constant(scale, [one.weight], "a scale a row"),
        )
        epilogue = () if one.activation == "none" else (one.activation, one.parameter)
        return rewriter.call(
            DYNAMIC_QUANTIZED_LINEAR.overload, source(match.root), *made, one.bias, *epilogue
        )

    rebuild(rewriter, match, make)


PASS = register(Pass("quantize_linear_int8", "cast", matches, rewrite, check, level=3, exact=False))
