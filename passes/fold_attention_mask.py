"""attention(mask=all true) -> no mask; attention(mask=key <= query and m) -> is_causal, mask=m; expanded mask -> mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_size
from graphopt.ir.pattern import Call, Match, Var, argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._ranges import is_causal_comparison
from graphopt.passes._scalars import tensor

aten = torch.ops.aten
_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)

pattern = Call(
    ATTENTION.overload,
    Var("q"),
    Var("k"),
    Var("v"),
    tensor("mask"),
    is_causal=Var("causal"),
    scale=Var("scale"),
)


@dataclass(frozen=True)
class Known:
    """What is known of a mask: ``is_causal`` and ``rest`` together say the same.

    Args:
        rest: what remains to be masked, None for nothing.
        is_causal: the mask allows only keys up to the query's position.
    """

    rest: fx.Node | None
    is_causal: bool


def check(match: Match) -> str | None:
    """Refuse what cannot be simplified; the reason tells what the mask is."""
    known = simplify(match.graph, match["mask"])
    if known == Known(match["mask"], False):
        return "the mask depends on the inputs: it is computed, not recognised"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Say what the mask says by the op's own arguments."""
    known = simplify(match.graph, match["mask"])
    causal = known.is_causal or match["causal"]
    args = (match["q"], match["k"], match["v"], known.rest, causal, match["scale"])
    rewriter.replace(match.root, rewriter.call(ATTENTION.overload, *args))


def simplify(graph: Graph, mask: fx.Node) -> Known:
    """Take a mask apart as far as it is known."""
    constant = graph.constant(mask)
    if constant is not None:
        return _simplify_constant(mask, constant)
    if is_causal_comparison(graph, mask):
        return Known(None, True)
    if mask.target is aten.expand.default and mask.op == "call_function":
        source: Any = mask.args[0]
        if source.meta["val"].dim() >= 2 and _broadcasts(source.meta["val"], mask.meta["val"]):
            return simplify(graph, source)
    if mask.target in _ANDS and mask.op == "call_function":
        sides: Any = [argument(mask, "self"), argument(mask, "other")]
        for this, other in (sides, sides[::-1]):
            known = simplify(graph, this)
            if known.rest is None and other.meta["val"].dim() >= 2:
                rest = simplify(graph, other)
                return Known(rest.rest, known.is_causal or rest.is_causal)
    return Known(mask, False)


def _simplify_constant(node: fx.Node, mask: torch.Tensor) -> Known:
    """All true (or all zero, added), or lower triangular."""
    if mask.dtype == torch.bool:
        allowed, forbidden = mask, ~mask
    else:
        allowed = mask == 0
        forbidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(allowed.all()):
        return Known(None, False)
    if mask.dim() >= 2:
        lower = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        if bool((allowed == lower).all()) and bool((forbidden == ~lower).all()):
            return Known(None, True)
    return Known(node, False)


def _broadcasts(source: torch.Tensor, target: torch.Tensor) -> bool:
    """True when an expand only repeats dimensions of size 1."""
    pairs = zip(reversed(source.shape), reversed(target.shape), strict=False)
    return all(same_size(a, 1) or same_size(a, b) for a, b in pairs)


PASS = register(Pass("fold_attention_mask", "fold", pattern, rewrite, check))
