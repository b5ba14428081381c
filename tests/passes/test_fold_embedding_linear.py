from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_embedding_linear import PASS
from tests._models import randn, tokens
from tests.passes._harness import program, run

IDS = tokens(2, 5)


def factorised(m, ids):
    return m.linear(m.table(ids))


def test_a_factorised_embedding() -> None:
    run(PASS, program(factorised, table=nn.Embedding(53, 4), linear=nn.Linear(4, 8)), IDS).becomes(
        before="""
            %0 = embedding(table.weight, ids)
            %1 = linear(%0, linear.weight, linear.bias)
            return %1
        """,
        expected="""
            %0 = embedding(<projected: table.weight, linear.weight, linear.bias>, ids)
            return %0
        """,
    )


def test_without_a_bias() -> None:
    model = program(factorised, table=nn.Embedding(53, 8), linear=nn.Linear(8, 4, bias=False))
    run(PASS, model, IDS).counts(embedding=1, linear=0)


def test_a_large_vocabulary_is_refused() -> None:
    model = program(factorised, table=nn.Embedding(20000, 4), linear=nn.Linear(4, 256))
    run(PASS, model, IDS).refuses("the constant would be 19 MiB larger than what it is made from")


def test_a_table_that_the_head_reads_is_refused() -> None:
    def forward(m, ids):
        return F.linear(m.linear(m.table(ids)), m.table.weight)

    ran = run(PASS, program(forward, table=nn.Embedding(53, 8), linear=nn.Linear(8, 8)), IDS)
    ran.refuses("the table is also read by linear_1: it would be held twice")


def test_rows_that_are_read_are_refused() -> None:
    def forward(m, ids):
        rows = m.table(ids)
        return m.linear(rows), rows

    ran = run(PASS, program(forward, table=nn.Embedding(53, 4), linear=nn.Linear(4, 8)), IDS)
    ran.refuses("embedding is also read by output")


def test_weights_that_are_inputs_are_refused() -> None:
    def forward(m, ids, w):
        return F.linear(m.table(ids), w)

    run(PASS, program(forward, table=nn.Embedding(53, 4)), IDS, randn(8, 4)).refuses("w is not a constant")


def test_weights_that_overflow_are_refused() -> None:
    model = program(factorised, table=nn.Embedding(60, 4), linear=nn.Linear(4, 8)).half()
    model.table.weight.data[59], model.linear.weight.data[:] = 300.0, 300.0
    run(PASS, model, IDS, redraw=False).refuses("the new weights would overflow torch.float16")


def test_dynamic_sizes() -> None:
    model = program(factorised, table=nn.Embedding(53, 4), linear=nn.Linear(4, 8))
    ran = run(PASS, model, IDS, dynamic={"ids": {0: "batch", 1: "seq"}}).counts(embedding=1, linear=0)
    ran.agrees(tokens(3, 4)).agrees(tokens(1, 9))
