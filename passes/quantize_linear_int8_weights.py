"""activation(linear(x, w, b)) -> block_quantized_linear(x, w8, scale, 8, b, activation)."""

from __future__ import annotations

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Match
from graphopt.passes._blocks import quantize_blocks, refuse_blocks
from graphopt.passes._projections import matches


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """What is read for each token are 8 bits a weight, and a scale for 32 of them."""
    quantize_blocks(rewriter, match, 8)


PASS = register(
    Pass("quantize_linear_int8_weights", "cast", matches, rewrite, refuse_blocks, level=3, exact=False)
)
