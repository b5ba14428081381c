from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_linear_linear import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


def two(m, x):
    return m.two(m.one(x))


def test_two_projections() -> None:
    of = "one.weight, one.bias, two.weight, two.bias"
    run(PASS, program(two, one=nn.Linear(8, 6), two=nn.Linear(6, 4)), X).becomes(
        before="""
            %0 = linear(x, one.weight, one.bias)
            %1 = linear(%0, two.weight, two.bias)
            return %1
        """,
        expected=f"""
            %0 = linear(x, <multiplied: {of}>, <multiplied: {of}>)
            return %0
        """,
    )


def test_with_and_without_biases() -> None:
    def forward(m, x):
        return m.b(m.a(x)), m.d(m.c(x)), m.f(m.e(x))

    sizes = {"a": (8, 7, False), "b": (7, 6, True), "c": (8, 7, True), "d": (7, 6, False)}
    sizes |= {"e": (8, 7, False), "f": (7, 6, False)}
    ran = run(PASS, program(forward, **{name: nn.Linear(*size) for name, size in sizes.items()}), X)
    ran.counts(linear=3)


def test_a_chain() -> None:
    def forward(m, x):
        return m.three(m.two(m.one(x)))

    layers = {"one": nn.Linear(8, 9), "two": nn.Linear(9, 12), "three": nn.Linear(12, 8)}
    run(PASS, program(forward, **layers), X).counts(linear=1)


def test_rows_move_between() -> None:
    def forward(m, x):
        return m.two(m.one(x).transpose(0, 1).reshape(10, 6).unsqueeze(0)), m.two(m.one(x).view(-1, 6))

    ran = run(PASS, program(forward, one=nn.Linear(8, 6), two=nn.Linear(6, 5)), X)
    ran.counts(linear=2)


def test_a_narrow_product_is_refused() -> None:
    ran = run(PASS, program(two, one=nn.Linear(8, 2), two=nn.Linear(2, 8)), X)
    ran.refuses("one product takes 128 FLOPs a row, the two take 64")


def test_a_hidden_value_that_is_read_is_refused() -> None:
    def forward(m, x):
        y = m.one(x)
        return m.two(y), y

    run(PASS, program(forward, one=nn.Linear(8, 6), two=nn.Linear(6, 4)), X).refuses(
        "linear is also read by output"
    )


def test_weights_that_are_inputs_are_refused() -> None:
    def forward(m, x, w, b):
        return F.linear(m.one(x), w), F.linear(m.one(x), m.two.weight, b)

    ran = run(PASS, program(forward, one=nn.Linear(8, 6), two=nn.Linear(6, 4)), X, randn(4, 6), randn(4))
    ran.refuses("^w is not a constant").refuses("^b is not a constant")


def test_weights_that_overflow_are_refused() -> None:
    model = program(two, one=nn.Linear(8, 6), two=nn.Linear(6, 4)).half()
    model.one.weight.data[:] = 300.0
    model.two.weight.data[:] = 300.0
    run(PASS, model, 1e-5 * X.half(), redraw=False).refuses("the new weights would overflow torch.float16")


def test_what_is_between_or_mixes_features_stays() -> None:
    def forward(m, x):
        return m.two(m.one(x).relu()), m.two(m.one(x).transpose(1, 2).reshape(2, 5, 6))

    run(PASS, program(forward, one=nn.Linear(8, 6), two=nn.Linear(6, 4)), X).stays()


def test_half_precision() -> None:
    model = program(two, one=nn.Linear(8, 6), two=nn.Linear(6, 4)).bfloat16()
    run(PASS, model, X.bfloat16()).counts(linear=1)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return m.two(m.one(x).reshape(x.shape[0] * x.shape[1], 6))

    model = program(forward, one=nn.Linear(8, 6), two=nn.Linear(6, 4))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}}).counts(linear=1)
    ran.agrees(randn(3, 4, 8)).agrees(torch.ones(1, 1, 8))
