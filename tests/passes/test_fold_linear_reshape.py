from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graphopt.passes import fuse_linear
from graphopt.passes.fold_linear_reshape import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


def test_rows_that_come_back() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).reshape(2, 5, 12)

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).becomes(
        "%0 = linear(x, fc.weight, fc.bias)\nreturn %0",
        before="""
            %0 = reshape(x, [-1, 8])
            %1 = linear(%0, fc.weight, fc.bias)
            %2 = reshape(%1, [2, 5, 12])
            return %2
        """,
    )


def test_the_layer_of_gpt2() -> None:
    def forward(m, x):
        return m.fc(x)

    ran = run([fuse_linear.PASS, PASS], program(forward, fc=Conv1D(12, 8)), X)
    ran.becomes("%0 = linear(x, <transposed: fc.weight>, fc.bias)\nreturn %0")


def test_rows_that_are_grouped_otherwise_are_refused() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).reshape(5, 2, 12)

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).refuses(
        r"rows of shape \[2, 5\] come back as \[5, 2\]"
    )


def test_split_heads_are_refused() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).reshape(2, 5, 3, 4)

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).refuses(r"come back as \[2, 5, 3\]")


def test_features_that_are_cut_are_refused() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 4)).reshape(2, 5, 24)

    run(PASS, program(forward, fc=nn.Linear(4, 12)), X).refuses(r"rows of shape")


def test_a_projection_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        y = m.fc(x.reshape(-1, 8))
        return y.reshape(2, 5, 12), y.sum()

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).refuses("linear is also read by sum_1")


def test_flat_rows_may_be_read_by_others() -> None:
    def forward(m, x):
        flat = x.reshape(-1, 8)
        return m.fc(flat).reshape(2, 5, 12), flat.sin()

    run(PASS, program(forward, fc=nn.Linear(8, 12, bias=False)), X).becomes("""
        %0 = reshape(x, [-1, 8])
        %1 = linear(x, fc.weight, None)
        %2 = sin(%0)
        return %1, %2
    """)


def test_without_the_first_reshape_it_stays() -> None:
    def forward(m, x):
        return m.fc(x.sin()).reshape(10, 12)

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).stays()


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return m.fc(x)

    names = {"x": {0: "batch", 1: "seq"}}
    ran = run([fuse_linear.PASS, PASS], program(forward, fc=Conv1D(12, 8)), X, dynamic=names)
    ran.counts(linear=1, reshape=0).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))


def test_dynamic_rows_that_are_grouped_otherwise_are_refused() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).reshape(x.shape[1], x.shape[0], 12)

    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.refuses("rows of shape").agrees(randn(3, 2, 8)).agrees(randn(4, 4, 8))


def test_weights_in_half_precision() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).reshape(2, 5, 12)

    run(PASS, program(forward, fc=nn.Linear(8, 12).bfloat16()), X.to(torch.bfloat16)).counts(reshape=0)
