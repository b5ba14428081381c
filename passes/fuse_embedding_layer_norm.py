"""layer_norm(word[ids] + type[types] + position[positions]) -> embedding_layer_norm(ids, word, ...)."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_shape, same_size
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
    Var("w"),
    Var("b"),
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
    result = match.root.meta["val"]
    if _word(match) is None:
        return "no lookup is made for every token"
    for index in _lookups(match):
        ids, table = match.val(f"ids{index}"), match.val(f"table{index}")
        rows = same_size(ids.shape[0], 1) or same_size(ids.shape[0], result.shape[0])
        if not rows or not same_shape((ids.shape[1], table.shape[1]), result.shape[1:]):
            return f"looking up {list(ids.shape)} in {list(table.shape)} is broadcast to {list(result.shape)}"
        if table.dtype != result.dtype:
            return f"a table is {table.dtype}, not {result.dtype}"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; which table counts as positions and which as types makes no difference to the sum."""
    word = _word(match)
    rest = [index for index in _lookups(match) if index != word]
    args: list[Any] = [match[f"ids{word}"], match[f"table{word}"]]
    # one row of ids for all sequences: positions
    for index in sorted(rest, key=lambda index: not same_size(match.val(f"ids{index}").shape[0], 1)):
        args += [match[f"ids{index}"], match[f"table{index}"]]
    args += [None] * (6 - len(args))
    call = rewriter.call(EMBEDDING_LAYER_NORM.overload, *args, match["w"], match["b"], float(match["eps"]))
    rewriter.replace(match.root, call)


def _lookups(match: Match) -> list[int]:
    return [index for index in range(3) if f"ids{index}" in match.bindings]


def _word(match: Match) -> int | None:
    """Which lookup is made once a token: its ids have the shape of the result."""
    wanted = match.root.meta["val"].shape[:-1]
    full = [i for i in _lookups(match) if same_shape(match.val(f"ids{i}").shape, wanted)]
    # the largest table is the vocabulary
    return max(full, key=lambda i: match.val(f"table{i}").shape[0], default=None)


PASS = register(Pass("fuse_embedding_layer_norm", "fuse", pattern, rewrite, check))
