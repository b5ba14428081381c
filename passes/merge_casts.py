"""to(to(x, wide), dtype) -> to(x, dtype), or x itself where that is its type.

Casting to a type that holds every value of the first one changes nothing, so the second cast may start from
the value itself. A narrowing in between rounds, and is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._affine import MOVES

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.type_as.default)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every cast of a cast, moved in between or not."""
    for target in _CASTS:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            moves: list[fx.Node] = []
            inner = None if node._erased else node.args[0]
            while isinstance(inner, fx.Node) and inner.target in MOVES:
                moves.insert(0, inner)
                inner = inner.args[0]
            if isinstance(inner, fx.Node) and inner.target in _CASTS:
                nodes = (inner, *moves, node)
                yield Match(graph, node, nodes, {"x": inner.args[0], "inner": inner, "moves": moves})


def check(match: Match) -> str | None:
    """The first cast must keep every value, or the second must drop all that the first drops."""
    first, between, last = (n.meta["val"].dtype for n in (match["x"], match["inner"], match.root))
    if first.is_complex or between.is_complex or last.is_complex:
        return "complex values are cast"
    if _integers(first, between, last) and _bits(last) <= min(_bits(between), _bits(first)):
        return None  # integers are cut off to their lowest bits
    if not _holds(between, first):
        return f"the cast to {between} rounds what is {first}"
    if last.is_floating_point or last == torch.bool or _holds(last, first):
        return None
    return f"what {last} cannot hold is cast in another way from {between} than from {first}"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Cast once, or not at all."""
    value, dtype = match["x"], match.root.meta["val"].dtype
    if value.meta["val"].dtype != dtype:
        value = rewriter.call(aten.to.dtype, value, dtype)
    for move in match["moves"]:
        value = rewriter.call(move.target, value, *move.args[1:], **move.kwargs)
    rewriter.replace(match.root, value)


def _integers(*dtypes: torch.dtype) -> bool:
    return not any(dtype.is_floating_point or dtype == torch.bool for dtype in dtypes)


def _bits(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).bits


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """True when every value of the narrow type is one of the wide type."""
    if wide == narrow or narrow == torch.bool:
        return True
    if wide == torch.bool or (narrow.is_floating_point and not wide.is_floating_point):
        return False
    if narrow.is_floating_point:
        a, b = torch.finfo(wide), torch.finfo(narrow)
        return a.eps <= b.eps and a.max >= b.max and a.smallest_normal * a.eps <= b.smallest_normal * b.eps
    whole = torch.iinfo(narrow)
    if wide.is_floating_point:  # whole numbers without a gap up to 2 / eps
        return max(-whole.min, whole.max) <= 2 / torch.finfo(wide).eps
    return torch.iinfo(wide).min <= whole.min and torch.iinfo(wide).max >= whole.max


PASS = register(Pass("merge_casts", "prune", pattern, rewrite, check))
