"""scaled_dot_product_attention(q, k, v), heads first -> attention(q, k, v), tokens first, no k repeated."""

from __future__ import annotations

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_size
from graphopt.ir.pattern import Call, Match, Var
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._heads import tokens_first, unrepeated
from graphopt.passes._scalars import tensor

aten = torch.ops.aten

pattern = Call(
    aten.scaled_dot_product_attention.default,
    tensor("q", rank=4),
    tensor("k", rank=4),
    tensor("v", rank=4),
    Var("mask"),
    dropout_p=Var("dropout"),
    is_causal=Var("causal"),
    scale=Var("scale"),
    enable_gqa=Var("gqa"),
)


def check(match: Match) -> str | None:
    """Inference only, one batch size, heads that divide, and a mask of the query's type."""
    if match["dropout"]:
        return f"it drops out with probability {match['dropout']}"
    if match["scale"] is not None and match["scale"] <= 0:
        return f"its scale is {match['scale']}, not above zero"
    q, k, v = match.val("q"), match.val("k"), match.val("v")
    if not same_size(q.shape[0], k.shape[0]) or not same_size(k.shape[0], v.shape[0]):
        return "query, key and value differ in batch size"
    if not same_size(k.shape[1], v.shape[1]):
        return "key and value differ in the number of heads"
    if not isinstance(k.shape[1], int) or q.shape[1] % k.shape[1]:
        return f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads"
    if match["mask"] is not None and match.val("mask").dtype not in (torch.bool, q.dtype):
        return f"the mask is {match.val('mask').dtype}, not {q.dtype}"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Transpose once around the op (which cancels against the transposes already there)."""
    query = tokens_first(rewriter, match["q"])
    key, value = (tokens_first(rewriter, unrepeated(match[name])) for name in ("k", "v"))
    if key.meta["val"].shape[2] != value.meta["val"].shape[2]:
        key, value = (tokens_first(rewriter, match[name]) for name in ("k", "v"))
    args = (query, key, value, match["mask"], match["causal"], match["scale"])
    attended = rewriter.call(ATTENTION.overload, *args)
    rewriter.replace(match.root, rewriter.call(aten.transpose.int, attended, 1, 2))


PASS = register(Pass("fuse_attention", "fuse", pattern, rewrite, check))
