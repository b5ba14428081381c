from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_embedding_scale import PASS
from tests._models import randn, tokens
from tests.passes._harness import program, run

IDS = tokens(2, 5)


def scaled(m, ids):
    return m.table(ids) * 8**0.5


def test_an_embedding() -> None:
    def forward(m, ids):
        return m.table(ids) * 8**0.5 + m.kind

    ran = run(PASS, program(forward, table=nn.Embedding(53, 8), kind=randn(8)), tokens(2, 5))
    ran.becomes("""
        %0 = embedding(<scale folded: table.weight, kind>, ids)
        return %0
    """)


def test_one_table_for_encoder_and_decoder_stays_one() -> None:
    def forward(m, ids, others):
        return m.table(ids) * 3, m.table(others) * 3

    ran = run(PASS, program(forward, table=nn.Embedding(53, 8)), IDS, tokens(2, 4, seed=1))
    ran.counts(mul=0, embedding=2)
    assert len(ran.graph.constants) == 1


def test_a_table_that_the_head_reads_is_refused() -> None:
    def forward(m, ids):
        return F.linear(m.table(ids) * 2, m.table.weight)

    ran = run(PASS, program(forward, table=nn.Embedding(53, 8)), tokens(2, 5))
    ran.refuses("the weight is also read by linear: it would be held twice")


def test_a_row_that_is_also_read_is_refused() -> None:
    def forward(m, ids):
        rows = m.table(ids)
        return rows * 2, rows

    run(PASS, program(forward, table=nn.Embedding(53, 8)), IDS).refuses("embedding is also read by output")


def test_a_table_that_is_an_input_is_refused() -> None:
    def forward(m, ids, table):
        return F.embedding(ids, table) * 2

    run(PASS, program(forward), IDS, randn(53, 8)).refuses("w is not a constant")


def test_a_table_that_would_overflow_is_refused() -> None:
    def forward(m, ids):
        return m.table(ids) * 6e4

    model = program(forward, table=nn.Embedding(60, 8)).half()
    model.table.weight.data[59] = 60.0
    run(PASS, model, IDS, redraw=False).refuses("the new weights would overflow torch.float16")


def test_positions_stay() -> None:
    def forward(m, ids):
        return m.table(ids) + m.positions

    run(PASS, program(forward, table=nn.Embedding(53, 8), positions=randn(5, 8)), IDS).stays()


def test_half_precision() -> None:
    run(PASS, program(scaled, table=nn.Embedding(53, 8)).bfloat16(), IDS).counts(mul=0)


def test_dynamic_sizes() -> None:
    ran = run(PASS, program(scaled, table=nn.Embedding(53, 8)), IDS, dynamic={"ids": {0: "batch", 1: "seq"}})
    ran.counts(mul=0).agrees(tokens(3, 4)).agrees(tokens(1, 9))
