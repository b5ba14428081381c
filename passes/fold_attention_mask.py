"""attention(mask=true or 0) -> no mask; (mask=causal & m) -> is_causal, mask=m; expanded mask -> mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_size
from graphopt.ir.pattern import Call, Match, Or, Var, argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._ranges import as_uniform, is_causal
from graphopt.passes._scalars import tensor

aten = torch.ops.aten
_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)

_rest = {"is_causal": Var("causal"), "scale": Var("scale")}

pattern = Or(
    Call(ATTENTION.overload, Var("q"), Var("k"), Var("v"), tensor("mask"), **_rest),
    Call(
        aten.scaled_dot_product_attention.default,
        *(tensor("q"), tensor("k"), tensor("v"), tensor("mask")),
        dropout_p=Var("dropout"),
        enable_gqa=Var("gqa"),
        **_rest,
    ),
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
    known = simplify(match, match["mask"])
    if known != Known(match["mask"], False):
        both = known.is_causal and known.rest is not None and not _is_ours(match)
        return "scaled_dot_product_attention takes either a mask or is_causal" if both else None
    if match.constant("mask") is not None:
        return "the mask is a constant that is neither true everywhere nor causal"
    return "the mask depends on the inputs: it is computed, not recognised"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Say what the mask says by the op's own arguments."""
    known = simplify(match, match["mask"])
    causal = known.is_causal or match["causal"]
    args, scale = (match["q"], match["k"], match["v"], known.rest), match["scale"]
    if _is_ours(match):
        rewriter.replace(match.root, rewriter.call(ATTENTION.overload, *args, causal, scale))
        return
    named = {"dropout_p": match["dropout"], "is_causal": causal, "scale": scale, "enable_gqa": match["gqa"]}
    rewriter.replace(match.root, rewriter.call(aten.scaled_dot_product_attention.default, *args, **named))


def _is_ours(match: Match) -> bool:
    """True for the op that takes tokens first, False for torch's, which takes heads first."""
    return match.root.target is ATTENTION.overload


def simplify(match: Match, mask: fx.Node) -> Known:
    """Take a mask apart as far as it is known."""
    graph, val = match.graph, mask.meta["val"]
    filled = as_uniform(graph, mask)
    if filled is not None and filled == (val.dtype == torch.bool):  # true everywhere, or 0 added
        return Known(None, False)
    constant = graph.constant(mask)
    if _covers_scores(match, val) and (is_causal(graph, mask) or _is_lower_triangle(constant)):
        return Known(None, True)
    source = _behind(graph, mask)
    if source is not None and _broadcasts(source.meta["val"], val):
        return simplify(match, source)
    if mask.target in _ANDS and mask.op == "call_function":
        sides: Any = [argument(mask, "self"), argument(mask, "other")]
        if any(side.meta["val"].dtype != torch.bool for side in sides):
            return Known(mask, False)
        for this, other in (sides, sides[::-1]):
            known = simplify(match, this)
            if known.rest is None and other.meta["val"].dim() >= 2:
                rest = simplify(match, other)
                return Known(rest.rest, known.is_causal or rest.is_causal)
    return Known(mask, False)


def _behind(graph: Graph, mask: fx.Node) -> fx.Node | None:
    """The value that a mask repeats along dimensions, or chooses everywhere."""
    source: Any = None
    if mask.target is aten.expand.default and mask.op == "call_function":
        source = mask.args[0]
    elif mask.target in (aten.where.self, aten.where.ScalarOther) and as_uniform(graph, mask.args[0]):
        source = mask.args[1]
    return source if isinstance(source, fx.Node) else None


def _covers_scores(match: Match, mask: torch.Tensor) -> bool:
    """True when the mask has a row a query and a column a key: a single row serves every query alike."""
    if mask.dim() < 2:
        return False
    dim = -3 if _is_ours(match) else -2
    queries, keys = match.val("q").shape[dim], match.val("k").shape[dim]
    return same_size(mask.shape[-2], queries) and same_size(mask.shape[-1], keys)


def _is_lower_triangle(mask: torch.Tensor | None) -> bool:
    """True for a constant that allows the keys up to the query's position, and forbids the others."""
    if mask is None or mask.dim() < 2:
        return False
    if mask.dtype == torch.bool:
        allowed, forbidden = mask, ~mask
    else:
        allowed, forbidden = mask == 0, mask <= torch.finfo(mask.dtype).min / 2
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((allowed == lower).all()) and bool((forbidden == ~lower).all())


def _broadcasts(source: torch.Tensor, target: torch.Tensor) -> bool:
    """True when the source is the target, but for dimensions of size 1 that are repeated."""
    if source.dim() < 2 or source.dtype != target.dtype:
        return False
    pairs = zip(reversed(source.shape), reversed(target.shape), strict=False)
    return all(same_size(a, 1) or same_size(a, b) for a, b in pairs)


PASS = register(Pass("fold_attention_mask", "fold", pattern, rewrite, check))
