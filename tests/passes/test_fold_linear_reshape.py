from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from graphopt.passes import fuse_linear, remove_noops
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
            %0 = reshape(x, [10, 8])
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

    run(PASS, program(forward, fc=nn.Linear(4, 12)), X).refuses("reshape makes rows of 4 features out of 8")


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
        %0 = reshape(x, [10, 8])
        %1 = linear(x, fc.weight)
        %2 = sin(%0)
        return %1, %2
    """)


def test_without_the_first_reshape_it_stays() -> None:
    def forward(m, x):
        return m.fc(x.sin()).reshape(10, 12)

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).stays()


BLOCK = {"up": nn.Linear(8, 24), "down": nn.Linear(12, 8), "scale": randn(1, 8)}


def block(m, x):
    rows = F.layer_norm(x, (8,), m.scale[0])
    gate, up = m.up(rows).chunk(2, 1)
    return x + m.down(F.silu(gate) * up) * m.scale


def test_a_whole_block() -> None:
    def forward(m, x):
        return block(m, x.flatten(0, 1)).unflatten(0, (2, 5))

    ran = run([remove_noops.PASS, PASS], program(forward, **BLOCK), X)
    ran.counts(reshape=0, layer_norm=1, split=1).agrees(randn(2, 5, 8, seed=1))


def test_rows_that_come_back_twice() -> None:
    def forward(m, x):
        y = block(m, x.reshape(-1, 8))
        z = torch.cat([y, F.rms_norm(y, (8,))], -1).softmax(1)
        return y.reshape(x.shape), z.reshape(2, 5, 16)

    run([remove_noops.PASS, PASS], program(forward, **BLOCK), X).counts(reshape=0)


def test_rows_of_two_values() -> None:
    def forward(m, x, y):
        return (x.reshape(-1, 8) + y.reshape(-1, 8)).reshape(2, 5, 8)

    run(PASS, program(forward), X, randn(2, 5, 8, seed=1)).becomes("%0 = add(x, y)\nreturn %0")
    ran = run(PASS, program(forward), X, randn(5, 2, 8, seed=1))
    ran.refuses(r"rows of shape \[2, 5\] meet rows of shape \[5, 2\]")


def test_rows_that_others_make_are_refused() -> None:
    def forward(m, x, y):
        return (x.reshape(-1, 8) + y.cumsum(0)).reshape(2, 5, 8)

    run(PASS, program(forward), X, randn(10, 8)).refuses("cumsum is not made of rows")


def test_what_works_across_rows_is_refused() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).softmax(0).reshape(2, 5, 12)

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).stays()


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return m.fc(x)

    names = {"x": {0: "batch", 1: "seq"}}
    ran = run([fuse_linear.PASS, PASS], program(forward, fc=Conv1D(12, 8)), X, dynamic=names)
    ran.counts(linear=1, reshape=0).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))


def test_a_whole_block_of_dynamic_sizes() -> None:
    def forward(m, x):
        return block(m, x.reshape(-1, 8)).view(x.shape)

    ran = run([remove_noops.PASS, PASS], program(forward, **BLOCK), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(reshape=0).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))


def test_dynamic_rows_that_are_grouped_otherwise_are_refused() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).reshape(x.shape[1], x.shape[0], 12)

    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.refuses("rows of shape").agrees(randn(3, 2, 8)).agrees(randn(4, 4, 8))


def test_weights_in_half_precision() -> None:
    def forward(m, x):
        return m.fc(x.reshape(-1, 8)).reshape(2, 5, 12)

    run(PASS, program(forward, fc=nn.Linear(8, 12).bfloat16()), X.to(torch.bfloat16)).counts(reshape=0)
