from __future__ import annotations

import torch

from graphopt.passes import fold_constants
from graphopt.passes.fold_index import PASS
from tests._models import padding, randn
from tests.passes._harness import program, run

X = randn(2, 5)
B, S = torch.arange(2), torch.arange(5)


def read(indices):
    def forward(m, x):
        return x[indices(x.shape[0], x.shape[1])]

    return program(forward)


SPELLINGS = {
    "rows and columns": (lambda b, s: (torch.arange(b)[:, None], torch.arange(s)), []),
    "in four dimensions": (
        lambda b, s: (torch.arange(b)[:, None, None, None], torch.arange(s)[None, None, None]),
        [1, 2],
    ),
    "from 0 to n by 1": (lambda b, s: (torch.arange(0, b)[:, None], torch.arange(0, s, 1)), []),
    "shifted there and back": (lambda b, s: (torch.arange(b)[:, None], torch.arange(3, s + 3)[None] - 3), []),
    "reshaped": (lambda b, s: (torch.arange(b).view(-1, 1, 1), torch.arange(s).reshape(1, 1, -1)), [1]),
    "expanded": (lambda b, s: (torch.arange(b)[:, None].expand(b, s), torch.arange(s).expand(b, s)), []),
    "a cut of a longer range": (lambda b, s: (torch.arange(b)[:, None], torch.arange(9)[:s]), []),
    "narrow integers": (
        lambda b, s: (torch.arange(b)[:, None], torch.arange(s, dtype=torch.int32).long()),
        [],
    ),
}
REFUSED = {
    "one dimension": (lambda b, s: (torch.arange(b),), "not every dimension is indexed"),
    "a slice": (lambda b, s: (slice(None), torch.arange(s)), "not every dimension is indexed"),
    "backwards": (lambda b, s: (torch.arange(b)[:, None], torch.arange(s).flip(0)), "index 1 is not a range"),
    "by twos": (lambda b, s: (torch.arange(b)[:, None], torch.arange(0, s, 2)), "index 1 is not a range"),
    "doubled": (
        lambda b, s: (torch.arange(b)[:, None], torch.add(torch.arange(s), 1, alpha=-1) + 1),
        "index 1 is not a range",
    ),
    "some of it": (
        lambda b, s: (torch.arange(b)[:, None], torch.arange(3)),
        "index 1 is not the whole dimension",
    ),
    "from 1 on": (lambda b, s: (torch.arange(b)[:, None], torch.arange(1, 5)), "index 1 is not the whole"),
    "from behind": (lambda b, s: (torch.arange(b)[:, None], torch.arange(5) - 5), "index 1 is not the whole"),
    "transposed": (
        lambda b, s: (torch.arange(b), torch.arange(s)[:, None]),
        "the ranges do not run along the dimensions in order",
    ),
    "repeated": (
        lambda b, s: (torch.arange(b)[:, None, None].expand(2, 3, 5), torch.arange(s)),
        "the indices also repeat values",
    ),
    "the first element again and again": (
        lambda b, s: (torch.arange(b)[:, None], torch.arange(1).expand(5)),
        "index 1 is not a range",
    ),
}


def test_reading_in_order_is_a_view() -> None:
    def forward(m, x):
        return [x[indices(2, 5)] for indices, _ in SPELLINGS.values()]

    ran = run(PASS, program(forward), X).counts(index=0)
    shapes = [tuple(node.meta["val"].shape) for node in ran.graph.output.args[0]]
    assert shapes == [(2, 5), (2, 1, 1, 5), (2, 5), (2, 5), (2, 1, 5), (2, 5), (2, 5), (2, 5)]
    assert set(ran.graph.op_counts()) == {"aten.unsqueeze"}


def test_ranges_that_were_folded() -> None:
    def forward(m, x):
        return x[m.rows[:, None], m.columns]

    ran = run([fold_constants.PASS, PASS], program(forward, rows=B, columns=S), X)
    ran.becomes("return x")


def test_reading_otherwise_is_refused() -> None:
    def forward(m, x):
        return [x[indices(2, 5)] for indices, _ in REFUSED.values()]

    ran = run(PASS, program(forward), X)
    for _, reason in REFUSED.values():
        ran.refuses(reason)
    missed, reasons = ran.remarks.of_kind("missed"), [reason for _, reason in REFUSED.values()]
    assert [reason in row.reason for row, reason in zip(missed, reasons, strict=True)] == [True] * len(
        reasons
    )


def test_a_diagonal_is_refused() -> None:
    def forward(m, x):
        return x[torch.arange(5), torch.arange(5)]

    run(PASS, program(forward), randn(5, 5)).refuses("the ranges do not run along the dimensions in order")


def test_indices_that_are_inputs_are_refused() -> None:
    def forward(m, x, i):
        return x[torch.arange(2)[:, None], i]

    run(PASS, program(forward), X, S).refuses("index 1 is not a range")


def test_a_constant_that_is_no_range_is_refused() -> None:
    def forward(m, x):
        return x[torch.arange(2)[:, None], m.i]

    ran = run([fold_constants.PASS, PASS], program(forward, i=torch.tensor([0, 1, 2, 4, 3])), X)
    ran.refuses("index 1 is not a range")


def test_a_longer_constant_range_is_refused() -> None:
    def forward(m, x):
        return x[torch.arange(2)[:, None], m.i]

    run(PASS, program(forward, i=torch.arange(4)), X).refuses("index 1 is not the whole dimension")


def test_a_value_read_in_order_twice() -> None:
    def forward(m, x):
        y = x.sin()
        return y[torch.arange(2)[:, None], torch.arange(5)] + y

    run(PASS, program(forward), X).becomes("%0 = sin(x)\n%1 = add(%0, %0)\nreturn %1")


def test_a_batch_of_one_that_is_repeated_is_refused() -> None:
    def forward(m, x):
        return x[torch.arange(1)[:, None], torch.arange(5).expand(3, 5)]

    run(PASS, program(forward), X[:1].clone()).refuses("the indices also repeat values")


def test_batches_of_one() -> None:
    run(PASS, read(SPELLINGS["in four dimensions"][0]), X[:1].clone()).counts(index=0, unsqueeze=2)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        spelled = (SPELLINGS[name][0] for name in ("in four dimensions", "expanded", "reshaped"))
        return [x[indices(*x.shape)] for indices in spelled]

    ran = run(PASS, program(forward), padding((5, 2), 5), dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(index=0).agrees(padding((1, 2, 3), 4)).agrees(padding((8,), 9))


def test_dynamic_sizes_and_fixed_ranges_are_refused() -> None:
    ran = run(PASS, read(REFUSED["some of it"][0]), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.refuses("index 1 is not the whole dimension").agrees(randn(3, 4)).agrees(randn(1, 3))
