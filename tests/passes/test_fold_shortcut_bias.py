from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.default import pipeline
from graphopt.passes.fold_shortcut_bias import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 4, 7, 7)


def summed(m, x):
    return m.one(x) + m.two(x)


def two(**options):
    return {"one": nn.Conv2d(4, 6, 3, padding=1, **options), "two": nn.Conv2d(4, 6, 1)}


def test_the_later_convolution_has_both() -> None:
    run(PASS, program(summed, **two()), X).becomes(
        before="""
            %0 = conv2d(x, one.weight, one.bias, [1, 1], [1, 1])
            %1 = conv2d(x, two.weight, two.bias)
            %2 = add(%0, %1)
            return %2
        """,
        expected="""
            %0 = conv2d(x, one.weight, None, [1, 1], [1, 1])
            %1 = conv2d(x, two.weight, <added: one.bias, two.bias>)
            %2 = add(%1, %0)
            return %2
        """,
    )


def test_a_sum_the_other_way_round_and_other_ranks() -> None:
    def forward(m, x):
        flat = x[..., 0]
        return m.two(x) + m.one(x), m.three(flat) + m.four(flat)

    flat = {"three": nn.Conv1d(4, 6, 3, padding="same"), "four": nn.Conv1d(4, 6, 1)}
    ran = run(PASS, program(forward, **two(), **flat), X)
    ran.counts(conv2d=2, conv1d=2, add=2)
    assert ran.kept == {"fold_shortcut_bias": 2}


def test_one_bias_is_left_as_it_is() -> None:
    run(PASS, program(summed, **two(bias=False)), X).stays()


def test_a_summand_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        y = m.one(x)
        return y + m.two(x), y

    run(PASS, program(forward, **two()), X).refuses("conv2d is also read by output")


def test_a_bias_that_is_an_input_is_refused() -> None:
    def forward(m, x, bias):
        return F.conv2d(x, m.weight, bias) + m.two(x)

    model = program(forward, weight=randn(6, 4, 1, 1), two=nn.Conv2d(4, 6, 1))
    run(PASS, model, X, randn(6, seed=1)).refuses("b is not a constant")


def test_a_sum_that_overflows_is_refused() -> None:
    model = program(summed, **two()).half()
    for layer in (model.one, model.two):
        layer.bias.data.fill_(6e4)
    run(PASS, model, 1e-3 * X.half(), redraw=False).refuses("the new weights would overflow torch.float16")


def test_a_broadcast_or_scaled_sum_stays() -> None:
    def forward(m, x):
        y = m.two(x)
        return m.one(x) + y.mean((2, 3), keepdim=True), torch.add(m.one(x), y, alpha=2)

    run(PASS, program(forward, **two()), X).stays()


def test_in_half_precision() -> None:
    run(PASS, program(summed, **two()).bfloat16(), X.bfloat16()).counts(conv2d=2)


def test_the_end_of_a_block_whose_shortcut_is_a_convolution() -> None:
    """Batch norms, sum and activation: two kernels are left, and the shortcut's adds no bias."""

    def forward(m, x):
        return torch.relu(m.norm(m.one(x)) + m.other(m.two(x)))

    ran = run(pipeline(), program(forward, **two(), norm=nn.BatchNorm2d(6), other=nn.BatchNorm2d(6)), X)
    ran.counts(conv2d=1, conv_activation=1, batch_norm=0, add=0, relu=0)
    (shortcut,) = ran.graph.fx.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    assert len(shortcut.args) == 2 or shortcut.args[2] is None


def test_dynamic_sizes() -> None:
    ran = run(PASS, program(summed, **two()), X, dynamic={"x": {0: "batch", 2: "height"}})
    ran.agrees(randn(3, 4, 5, 7)).agrees(randn(1, 4, 9, 7))
