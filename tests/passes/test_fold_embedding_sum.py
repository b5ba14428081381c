from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_constants import PASS as FOLD_CONSTANTS
from graphopt.passes.fold_embedding_sum import PASS
from tests import _models as models
from tests._models import randn, tokens
from tests.passes._harness import program, run

IDS = tokens(2, 5)


def tables(**rows: int) -> dict[str, nn.Embedding]:
    return {name: nn.Embedding(count, 8) for name, count in rows.items()}


def test_the_token_types_of_one_segment() -> None:
    def forward(m, ids):
        types, positions = torch.zeros_like(ids), torch.arange(ids.shape[1])
        return m.word(ids) + m.kind(types) + m.place(positions)

    run(PASS, program(forward, **tables(word=53, kind=2, place=9)), IDS).becomes(
        before="""
            %0 = zeros_like(ids)
            %1 = arange(5)
            %2 = embedding(word.weight, ids)
            %3 = embedding(kind.weight, %0)
            %4 = add(%2, %3)
            %5 = embedding(place.weight, %1)
            %6 = add(%4, %5)
            return %6
        """,
        expected="""
            %0 = arange(5)
            %1 = embedding(word.weight, ids)
            %2 = embedding(<tables added: place.weight, kind.weight>, %0)
            %3 = add(%1, %2)
            return %3
        """,
    )


ROWS = {
    "a buffer of zeros": lambda m, ids: m.kind(m.zeros.expand(1, -1).gather(1, m.places).expand(2, 5)),
    "ones": lambda m, ids: m.kind(ids.new_ones(ids.shape)),
    "filled": lambda m, ids: m.kind(torch.full_like(ids, 1)),
    "a table of one row": lambda m, ids: m.single(ids * 0),
    "a vector": lambda m, ids: m.single.weight[0] * 1,
}


def test_every_row() -> None:
    """All in one program, since capturing takes the time."""

    def forward(m, ids):
        return [row(m, ids) + m.place(ids) for row in ROWS.values()]

    buffers = {"zeros": torch.zeros(1, 9, dtype=torch.long), "places": torch.arange(5)[None]}
    ran = run(
        [PASS, FOLD_CONSTANTS, PASS], program(forward, **tables(kind=2, single=1, place=53), **buffers), IDS
    )
    ran.counts(embedding=len(ROWS), add=0)


def test_two_tables_by_the_same_ids() -> None:
    def forward(m, ids):
        return m.one(ids) + m.two(ids) + m.three(ids)

    run(PASS, program(forward, **tables(one=53, two=60, three=53)), IDS).counts(embedding=1, add=0)


def test_a_row_without_a_segment() -> None:
    def forward(m, ids, x):
        return m.word(ids) + (x + m.kind(torch.zeros_like(ids)))

    run(PASS, program(forward, **tables(word=53, kind=2)), IDS, randn(2, 5, 8)).counts(embedding=1, add=1)


def test_a_table_that_the_head_reads_is_refused() -> None:
    def forward(m, ids):
        return F.linear(m.word(ids) + m.kind(torch.zeros_like(ids)), m.word.weight)

    ran = run(PASS, program(forward, **tables(word=53, kind=2)), IDS)
    ran.refuses("the table is also read by linear: it would be held twice")


def test_a_table_that_is_an_input_is_refused() -> None:
    def forward(m, ids, table):
        return F.embedding(ids, table) + m.word(ids)

    run(PASS, program(forward, **tables(word=53)), IDS, randn(53, 8)).refuses("a table is not a constant")


def test_sums_that_overflow_are_refused() -> None:
    def forward(m, ids):
        return m.one(ids) + m.two(ids)

    model = program(forward, **tables(one=60, two=60)).half()
    for table in (model.one, model.two):
        table.weight.data[59] = 6e4
    run(PASS, model, IDS, redraw=False).refuses("the new weights would overflow torch.float16")


def test_others_stay() -> None:
    def forward(m, ids, types):
        one = m.word(ids) + m.kind(types)
        wide = m.kind(torch.zeros_like(ids)) + m.word(ids[:1])  # the row also gives the shape
        row = m.kind(torch.zeros_like(ids))
        return one, wide, row + m.word(ids), row, torch.add(m.word(ids), m.kind(ids * 0 + 1), alpha=2)

    run(PASS, program(forward, **tables(word=53, kind=2)), IDS, tokens(2, 5) % 2).stays()


def test_an_encoder_without_token_types() -> None:
    example = models.minilm()
    ran = run(PASS, example.model, kwargs=example.kwargs, redraw=False, dynamic=example.dynamic)
    ran.counts(embedding=2)
    for mask in (models.padding((4, 3, 1), 4), models.padding((9,), 9)):
        ran.agrees(tokens(*mask.shape), mask)


def test_half_precision() -> None:
    def forward(m, ids):
        return m.one(ids) + m.two(ids)

    run(PASS, program(forward, **tables(one=53, two=53)).bfloat16(), IDS).counts(embedding=1)


def test_dynamic_sizes() -> None:
    def forward(m, ids):
        types, positions = torch.zeros_like(ids), torch.arange(ids.shape[1])
        return m.word(ids) + m.kind(types) + m.place(positions)

    model = program(forward, **tables(word=53, kind=2, place=9))
    ran = run(PASS, model, IDS, dynamic={"ids": {0: "batch", 1: "seq"}}).counts(embedding=2)
    ran.agrees(tokens(3, 4)).agrees(tokens(1, 9))
