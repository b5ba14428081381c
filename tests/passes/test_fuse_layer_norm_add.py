from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from graphopt.passes import fuse_add_layer_norm
from graphopt.passes.fuse_layer_norm_add import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, R = randn(2, 5, 8), randn(2, 5, 8, seed=1)


def sum_of_norm(m, x, r):
    return r + m.norm(x)


def test_a_sum_of_a_norm() -> None:
    run(PASS, program(sum_of_norm, norm=nn.LayerNorm(8)), X, R).becomes(
        """
        %0 = graphopt.layer_norm_add(x, r, norm.weight, norm.bias, 1e-05)
        return %0
        """,
        """
        %0 = layer_norm(x, [8], norm.weight, norm.bias, 1e-05, False)
        %1 = add(r, %0)
        return %1
        """,
    )


def test_the_norm_may_come_first_or_have_no_weights() -> None:
    def forward(m, x, r):
        return F.layer_norm(x, (8,)) + r

    run(PASS, program(forward), X, R).becomes("""
        %0 = graphopt.layer_norm_add(x, r, None, None, 1e-05)
        return %0
    """)


def test_a_norm_of_the_sum_is_left_to_itself() -> None:
    """Five tensors are moved, with the sum and the second norm in one it would be six."""

    def forward(m, x, r):
        return m.two(r + m.one(x))

    ran = run(
        [PASS, fuse_add_layer_norm.PASS], program(forward, one=nn.LayerNorm(8), two=nn.LayerNorm(8)), X, R
    )
    ran.counts(layer_norm_add=1, layer_norm=1, add_layer_norm=0)


def test_a_residual_that_is_broadcast() -> None:
    for shape in ((1, 5, 8), (5, 8), (8,)):
        ran = run(PASS, program(sum_of_norm, norm=nn.LayerNorm(8)), X, randn(*shape))
        ran.counts(layer_norm_add=1, layer_norm=0, add=0)


def test_a_norm_that_is_broadcast_is_refused() -> None:
    ran = run(PASS, program(sum_of_norm, norm=nn.LayerNorm(8)), X[:1], R)
    ran.refuses(r"the norm has not the shape of the sum: \[1, 5, 8\] and \[2, 5, 8\]")


def test_a_norm_that_others_read_is_refused() -> None:
    def forward(m, x, r):
        normed = m.norm(x)
        return r + normed, normed.sin()

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R).refuses("layer_norm.* is also read by sin")


def test_two_normalised_dimensions_are_refused() -> None:
    ran = run(PASS, program(sum_of_norm, norm=nn.LayerNorm([5, 8])), X, R)
    ran.refuses("2 dimensions are normalised together")


def test_summands_of_integers_are_refused() -> None:
    ran = run(PASS, program(sum_of_norm, norm=nn.LayerNorm(8)), X, torch.arange(8)[None])
    ran.refuses("the summands differ in type: torch.float32 and torch.int64")


def test_half_precision_and_a_residual_in_float32() -> None:
    def widened(m, x, r):
        return m.norm(x).float() + r

    half = nn.LayerNorm(8).bfloat16()
    run(PASS, program(sum_of_norm, norm=half), X.bfloat16(), R.bfloat16()).counts(layer_norm_add=1)
    run(PASS, program(widened, norm=half), X.bfloat16(), R).counts(layer_norm_add=1, to=0)


def test_dynamic_sizes() -> None:
    names = {0: "batch", 1: "seq"}
    ran = run(PASS, program(sum_of_norm, norm=nn.LayerNorm(8)), X, R, dynamic={"x": names, "r": names})
    ran.counts(layer_norm_add=1).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))
    ran.agrees(randn(1, 9, 8), randn(1, 9, 8, seed=1))
