"""layer_norm(word[ids] + type[types] + position[positions]) -> embedding_layer_norm(ids, word, ...)."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import ANY, Call, Match, Or, Var, shared_inside
from graphopt.kernels.embedding_layer_norm import OP as EMBEDDING_LAYER_NORM
from graphopt.passes._scalars import number, tensor

aten = torch.ops.aten


def _look_up(table: str, ids: str) -> Call:
    return Call(
        aten.embedding.default,
        tensor(table, rank=2),
        tensor(ids, rank=2),
        padding_idx=ANY,
        scale_grad_by_freq=ANY,
        sparse=ANY,
    )


_first, _second, _third = (_look_up(f"table{i}", f"ids{i}") for i in range(3))
_two = Call(aten.add.Tensor, _first, _second)
_three = Or(Call(aten.add.Tensor, _two, _third), Call(aten.add.Tensor, _third, _two))

pattern = Call(
    aten.layer_norm.default,
    Or(_three, _two),
    Var("shape"),
    tensor("w"),
    tensor("b"),
    number("eps"),
    cudnn_enable=ANY,
)


def check(match: Match) -> str | None:
    """The largest lookup gives the shape; the others add to it, one row a token or one for all sequences."""
    shared = shared_inside(match)
    if shared:
        return f"{shared[0].name} is also read by {shared[1].name}"
    if len(match["shape"]) != 1:
        return f"{len(match['shape'])} dimensions are normalised together"
    if _word(match) is None:
        return "no lookup has the shape of the result"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; which table counts as positions and which as types makes no difference to the sum."""
    word = _word(match)
    rest = [index for index in range(3) if index != word and f"ids{index}" in match.bindings]
    args: list[Any] = [match[f"ids{word}"], match[f"table{word}"]]
    by_batch = sorted(
        rest, key=lambda index: match.val(f"ids{index}").shape[0] != 1
    )  # (1, S) first: positions
    for index in by_batch:
        args += [match[f"ids{index}"], match[f"table{index}"]]
    args += [None] * (6 - len(args))
    call = rewriter.call(EMBEDDING_LAYER_NORM.overload, *args, match["w"], match["b"], float(match["eps"]))
    rewriter.replace(match.root, call)


def _word(match: Match) -> int | None:
    """Which lookup is made once a token: its ids have the shape of the result."""
    wanted = tuple(match.root.meta["val"].shape[:-1])
    full = [
        i for i in range(3) if f"ids{i}" in match.bindings and tuple(match.val(f"ids{i}").shape) == wanted
    ]
    # the largest table is the vocabulary
    return max(full, key=lambda i: match.val(f"table{i}").shape[0], default=None)


PASS = register(Pass("fuse_embedding_layer_norm", "fuse", pattern, rewrite, check))
