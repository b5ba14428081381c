"""attention(mask=true or 0) -> no mask; causal & m -> is_causal, m; where(m, 0, fill) -> m, fill."""

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
from graphopt.kernels.attention import SWALLOWS
from graphopt.passes._ranges import as_uniform, is_causal
from graphopt.passes._scalars import tensor

aten = torch.ops.aten
_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)

_rest: dict[str, Any] = {"is_causal": Var("causal"), "scale": Var("scale")}

pattern = Or(
    Call(
        ATTENTION.overload,
        *(Var("q"), Var("k"), Var("v"), tensor("mask")),
        softcap=Var("softcap"),
        fill=Var("fill"),
        **_rest,
    ),
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
    known, fill = _simplified(match)
    if (known, fill) != (Known(match["mask"], match["causal"]), match.get("fill")):
        both = known.is_causal and known.rest is not None and not _is_ours(match)
        return "scaled_dot_product_attention takes either a mask or is_causal" if both else None
    if match.constant("mask") is not None:
        return "the mask is a constant that is neither true everywhere nor causal"
    return "the mask depends on the inputs: it is computed, not recognised"


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Say what the mask says by the op's own arguments."""
    known, fill = _simplified(match)
    inputs, causal, scale = (match["q"], match["k"], match["v"], known.rest), known.is_causal, match["scale"]
    if _is_ours(match):
        options = {"softcap": match["softcap"], "fill": fill}
        given = {name: option for name, option in options.items() if option is not None}
        attended = rewriter.call(ATTENTION.overload, *inputs, causal, scale, **given)
    else:
        options = {"dropout_p": match["dropout"], "scale": scale, "enable_gqa": match["gqa"]}
        torchs = aten.scaled_dot_product_attention.default
        attended = rewriter.call(torchs, *inputs, is_causal=causal, **options)
    rewriter.replace(match.root, attended)


def _is_ours(match: Match) -> bool:
    """True for the op that takes tokens first, False for torch's, which takes heads first."""
    return match.root.target is ATTENTION.overload


def _simplified(match: Match) -> tuple[Known, float | None]:
    """What is known of the mask and of causality together, and the fill that goes with it."""
    mask, fill = match["mask"], match.get("fill")
    if not _is_ours(match):
        known = simplify(match, mask)
        return Known(known.rest, known.is_causal or match["causal"]), None
    if mask.meta["val"].dtype != torch.bool:
        if fill is not None and fill > SWALLOWS:  # what the mask adds and what it forbids are different
            return Known(mask, match["causal"]), fill
        if not match["causal"]:
            mask, fill = _condition(match, mask, fill)
    known = simplify(match, mask)
    known = Known(known.rest, known.is_causal or match["causal"])
    unfilled = fill is not None and fill <= SWALLOWS and _sees_something(match, known)
    return known, None if unfilled else fill


def _condition(match: Match, mask: fx.Node, fill: float | None) -> tuple[fx.Node, float | None]:
    """The condition m of an added ``where(m, 0, number)``, and the fill that says the same.

    Only for numbers that swallow every score that they are added to: then the score is the number.
    """
    inner = mask
    while inner.op == "call_function" and inner.target is aten.expand.default:
        source: Any = inner.args[0]
        inner = source
    if inner.op != "call_function" or inner.target not in _CHOICES:
        return mask, fill
    condition, zero, number = inner.args
    assert isinstance(condition, fx.Node)
    added = as_uniform(match.graph, number)
    lowest = torch.finfo(mask.meta["val"].dtype).min
    if as_uniform(match.graph, zero) != 0 or added is None or added > SWALLOWS:
        return mask, fill
    if condition.meta["val"].dtype != torch.bool or not _broadcasts(
        condition.meta["val"], mask.meta["val"], True
    ):
        return mask, fill
    return condition, fill if added < lowest else float(added)


_CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.Scalar)


def _sees_something(match: Match, known: Known) -> bool:
    """True when every query sees a key, whatever the inputs are: then nobody sees the fill either."""
    if known.rest is None:
        return True
    constant = match.graph.constant(known.rest)
    if constant is None or constant.dtype != torch.bool or constant.dim() < 2:
        return False
    if known.is_causal:
        if constant.shape[-2] == 1 and constant.shape[-1] > 1:
            return bool(constant[..., 0].all())
        constant = constant & torch.ones(constant.shape[-2:], dtype=torch.bool, device=constant.device).tril()
    return bool(constant.any(-1).all())


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
    if mask.op == "call_function" and mask.target is aten.slice.Tensor:
        whole: Any = mask.args[0]
        known = simplify(match, whole)  # what it repeats along the rows that are taken stays as it is
        repeats = known.rest is None or _broadcasts(known.rest.meta["val"], val)
        return known if repeats and not known.is_causal else Known(mask, False)
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


def _broadcasts(source: torch.Tensor, target: torch.Tensor, any_type: bool = False) -> bool:
    """True when the source is the target, but for dimensions of size 1 that are repeated."""
    if source.dim() < 2 or (source.dtype != target.dtype and not any_type):
        return False
    pairs = zip(reversed(source.shape), reversed(target.shape), strict=False)
    return all(same_size(a, 1) or same_size(a, b) for a, b in pairs)


PASS = register(Pass("fold_attention_mask", "fold", pattern, rewrite, check))
