"""op(x, w) -> to(op(to(x, float16), w16), float32): products in float16, and what lies between them."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Match
from graphopt.passes._precision import narrow, narrowed_matches, refuse_narrowing


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Cast around one node; casts that meet are merged behind this pass."""
    narrow(rewriter, match, torch.float16)


PASS = register(
    Pass("cast_to_float16", "cast", narrowed_matches, rewrite, refuse_narrowing, level=3, exact=False)
)
