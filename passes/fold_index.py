"""index(x, [arange(B) as (B,1,1,1), arange(S) as (1,1,1,S)]) -> x as (B,1,1,S): read in order, no copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import same_size
from graphopt.ir.pattern import Call, Match, Var
from graphopt.passes._ranges import as_range

aten = torch.ops.aten

pattern = Call(aten.index.Tensor, Var("x"), Var("indices"))


def check(match: Match) -> str | None:
    """Every dimension must be indexed by its whole range, each along a dimension of its own, in order."""
    shape, indices = match.val("x").shape, match["indices"]
    if len(indices) != len(shape) or any(index is None for index in indices):
        return "not every dimension is indexed"
    result = match.root.meta["val"].shape
    own: dict[int, Any] = {}
    for position, (size, index) in enumerate(zip(shape, indices, strict=True)):
        found = as_range(match.graph, index)
        if found is None:
            return f"index {position} is not a range"
        if found.start != 0 or not same_size(found.length, size):
            return f"index {position} is not the whole dimension of size {size}"
        own[found.dim % len(result)] = size
    if len(own) < len(shape) or list(own) != sorted(own):
        return "the ranges do not run along the dimensions in order"
    repeated = any(not same_size(size, own.get(dim, 1)) for dim, size in enumerate(result))
    return "the indices also repeat values" if repeated else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Insert the dimensions of size 1 that the indices' broadcasting makes."""
    ranges = [as_range(match.graph, index) for index in match["indices"]]
    rank = match.root.meta["val"].dim()
    own = {found.dim % rank for found in ranges if found is not None}
    value: Any = match["x"]
    for dim in range(rank):
        if dim not in own:
            value = rewriter.call(aten.unsqueeze.default, value, dim)
    assert isinstance(value, fx.Node)
    rewriter.replace(match.root, value)


PASS = register(Pass("fold_index", "fold", pattern, rewrite, check))
