from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from graphopt.passes.fuse_linear import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, W, B = randn(3, 8), randn(8, 12, seed=1), randn(12, seed=2)


def test_addmm() -> None:
    def forward(m, x):
        return torch.addmm(m.b, x, m.w)

    ran = run(PASS, program(forward, w=W, b=B), X)
    ran.becomes(
        "%0 = linear(x, <transposed: w>, b)\nreturn %0",
        before="%0 = addmm(b, x, w)\nreturn %0",
    )
    (constant,) = (c for c in ran.graph.constants.values() if c.how)
    assert constant.tensor.data_ptr() == ran.captured.constants["p_w"].tensor.data_ptr()  # no copy


def test_the_layer_of_gpt2() -> None:
    def forward(m, x):
        return m.fc(x)

    run(PASS, program(forward, fc=Conv1D(12, 8)), randn(2, 5, 8)).counts(linear=1, addmm=0, reshape=2)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_a_product_and_a_sum(shape: tuple[int, ...]) -> None:
    def forward(m, x):
        return m.b + x @ m.w

    run(PASS, program(forward, w=W, b=B), randn(*shape)).becomes(
        "%0 = linear(x, <transposed: w>, b)\nreturn %0"
    )


def test_a_weight_that_is_an_input_is_refused() -> None:
    def forward(m, x, w):
        return torch.addmm(m.b, x, w)

    run(PASS, program(forward, b=B), X, W).refuses("the weight is not a constant")


@pytest.mark.parametrize("shape", [(3, 12), (1,)])
def test_a_bias_that_is_not_one_value_a_column_is_refused(shape: tuple[int, ...]) -> None:
    def forward(m, x):
        return torch.addmm(m.b, x, m.w)

    ran = run(PASS, program(forward, w=W, b=randn(*shape)), X)
    ran.refuses(r"the bias has shape \[.*\], not one value for each of 12 columns")


def test_a_bias_of_another_type_is_refused() -> None:
    def forward(m, x):
        return x @ m.w + m.b

    ran = run(PASS, program(forward, w=W.bfloat16(), b=B), X.bfloat16())
    ran.refuses("the bias is torch.float32, not torch.bfloat16")


def test_a_product_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        y = x @ m.w
        return y + m.b, y

    run(PASS, program(forward, w=W, b=B), X).refuses("matmul is also read by output")


@pytest.mark.parametrize("scales", [{"alpha": 2}, {"beta": 2}, {"alpha": 0.5, "beta": 0}])
def test_a_scaled_sum_stays(scales: dict[str, float]) -> None:
    def forward(m, x):
        return torch.addmm(m.b, x, m.w, **scales)

    run(PASS, program(forward, w=W, b=B), X).stays()


def test_a_scaled_bias_stays() -> None:
    def forward(m, x):
        return torch.add(x @ m.w, m.b, alpha=2)

    run(PASS, program(forward, w=W, b=B), X).stays()


def test_a_product_of_batches_stays() -> None:
    def forward(m, x):
        return x @ m.w + m.b

    run(PASS, program(forward, w=randn(2, 8, 12), b=B), randn(2, 3, 8)).stays()


def test_one_weight_for_two() -> None:
    def forward(m, x):
        return torch.addmm(m.b, x, m.w) + torch.addmm(m.b, x.sin(), m.w)

    run(PASS, program(forward, w=W, b=B), X).counts(linear=2, addmm=0)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return torch.addmm(m.b, x, m.w) + (x @ m.w + m.b)

    ran = run(PASS, program(forward, w=W, b=B), X, dynamic={"x": {0: "batch"}})
    ran.counts(linear=2).agrees(randn(5, 8)).agrees(randn(1, 8))
