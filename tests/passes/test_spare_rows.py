"""Rows behind the last packed token: proved to be read by nobody, or named who may read them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.ir.graph import Graph, has_effect
from graphopt.passes._packing import packs_by_tokens
from graphopt.passes._spare_rows import reader_of_spare_rows
from graphopt.passes.hoist_pack import PASS as HOIST_PACK
from graphopt.passes.pack_tokens import PASS as PACK_TOKENS
from tests._models import padding, randn
from tests.passes._harness import program, run

ops = torch.ops.graphopt
X, MASK = randn(2, 5, 8), padding((5, 3), 5).bool()
HEADS = X.unflatten(2, (2, 4))


def indices_of(mask: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.squeeze.dim(torch.ops.aten.nonzero.default(mask.reshape([-1])), 1)


def offsets_of(mask: torch.Tensor, start: int = 0) -> torch.Tensor:
    ends = mask.to(torch.int32).sum([1]).cumsum(0)
    return torch.ops.aten.constant_pad_nd.default(ends, [1, 0], *([start] if start else [])).to(torch.int32)


def reader(forward: Callable[..., Any], *inputs: torch.Tensor, **weights: Any) -> str | None:
    graph = capture(program(forward, **weights), inputs)
    return found_in(graph)


def found_in(graph: Graph) -> str | None:
    asserted = [node for node in graph.calls if has_effect(node)]  # by export, of the number of tokens
    graph.erase_dead(asserted, proved=asserted)
    ((indices, _),) = packs_by_tokens(graph)
    return reader_of_spare_rows(graph, indices)


def test_a_layer_that_the_passes_packed_reads_none() -> None:
    def forward(m, x, mask):
        heads = m.qkv(F.layer_norm(x, (8,))).unflatten(2, (2, 4))
        y = ops.attention(heads, heads, heads, mask[:, None, None, :]).flatten(2)
        y = torch.softmax(m.out(y.relu()), -1) + x
        return torch.where(mask.unsqueeze(2), y, 0.0)

    ran = run([PACK_TOKENS, HOIST_PACK], program(forward, qkv=nn.Linear(8, 8), out=nn.Linear(8, 8)), X, MASK)
    ran.counts(packed_attention=1)
    assert found_in(ran.graph) is None


def mapped(m, x, mask):
    y = ops.pack_tokens(x, indices_of(mask))
    return ops.unpack_tokens(F.layer_norm(m.one(y), (8,)) * y[..., :1], mask)


def test_what_works_on_each_token_reads_none() -> None:
    assert reader(mapped, X, MASK, one=nn.Linear(8, 8)) is None


def summed(m, x, mask):
    return ops.pack_tokens(x, indices_of(mask)).sum(1)


def returned(m, x, mask):
    return ops.pack_tokens(x, indices_of(mask))


def counted(m, x, mask):
    indices = indices_of(mask)
    return ops.unpack_tokens(ops.pack_tokens(x, indices), mask) / indices.shape[0]


def mixed(m, x, mask):
    y = ops.pack_tokens(x, indices_of(mask))
    return ops.unpack_tokens(y @ (y.transpose(1, 2) @ y), mask)


def normed_along(m, x, mask):
    return ops.unpack_tokens(torch.softmax(ops.pack_tokens(x, indices_of(mask)), 1), mask)


def put_elsewhere(m, x, mask):
    return ops.unpack_tokens(ops.pack_tokens(x, indices_of(mask)), ~mask)


def weights(m, x, mask):
    y = ops.pack_tokens(x, indices_of(mask))
    return F.linear(x, y.squeeze(0))


def attended(start: int = 0, of: Callable[[torch.Tensor], torch.Tensor] = lambda mask: mask):
    def forward(m, x, mask):
        y = ops.pack_tokens(x, indices_of(mask)).squeeze(0)
        y = ops.packed_attention(y, y, y, offsets_of(of(mask), start), 5)
        return ops.unpack_tokens(y.unsqueeze(0), mask)

    return forward


READERS = {
    r"aten.sum \(sum_1\) reads rows of no token": summed,
    "the output reads rows of no token": returned,
    r"sym_size": counted,
    r"aten.matmul .* reads rows of no token": mixed,
    r"aten.softmax .* reads rows of no token": normed_along,
    r"graphopt.unpack_tokens .* reads rows of no token": put_elsewhere,
    r"aten.linear .* reads rows of no token": weights,
    r"graphopt.packed_attention .* reads rows": attended(of=lambda mask: ~mask),
    r"graphopt.packed_attention \(packed_attention.*\) reads rows": attended(start=1),
}


@pytest.mark.parametrize("reason", READERS)
def test_who_may_read_them_is_named(reason: str) -> None:
    found = reader(READERS[reason], HEADS if "attention" in reason else X, MASK)
    assert found is not None
    assert re.search(reason, found), found


def test_attention_up_to_the_last_token_reads_none() -> None:
    assert reader(attended(), HEADS, MASK) is None


def test_indices_of_something_else_are_not_known() -> None:
    def forward(m, x, places):
        return ops.pack_tokens(x, places)

    found = reader(forward, X, torch.tensor([1, 3]))
    assert found == "places is not the list of a mask's tokens"


def test_a_nonzero_with_another_reader_tells_their_number() -> None:
    def forward(m, x, mask):
        found = torch.ops.aten.nonzero.default(mask.reshape([-1]))
        indices = torch.ops.aten.squeeze.dim(found, 1)
        return ops.unpack_tokens(ops.pack_tokens(x, indices), mask), found + 1

    assert "counts the tokens" in str(reader(forward, X, MASK))
