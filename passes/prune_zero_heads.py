"""attention(x wq, x wk, x wv) wo -> the same without the heads whose rows of wv, or columns of wo, are zero.

A head goes from all four projections; heads that share a key and a value go together or not at all. Exact for
finite values: a value of zeros is taken to add nothing even where the scores are infinite.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._groups import heads, idle
from graphopt.passes._narrow import narrow


def pattern(graph: Graph) -> Iterator[Match]:
    """Every attention with heads that add nothing, or whose rows in one projection are zero."""
    return idle(graph, heads(graph))


def check(match: Match) -> str | None:
    """Every value between the layers must keep the heads apart."""
    group, zero = match["group"], match["zero"]
    if group.refusal is None:
        return None
    return f"{int(zero.sum())} of {group.units} heads are zero, but {group.refusal}"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Narrower projections; an attention keeps at least one head."""
    kept = torch.nonzero(~match["zero"]).flatten().tolist()
    narrow(rewriter, match["group"], kept or [0])


PASS = register(Pass("prune_zero_heads", "prune", pattern, rewrite, check))
