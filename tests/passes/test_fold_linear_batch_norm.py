from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_linear_batch_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(6, 8)


def norm_behind(m, x):
    return m.norm(m.linear(x))


def norm_in_front(m, x):
    return m.linear(m.norm(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_behind(bias: bool) -> None:
    ran = run(PASS, program(norm_behind, linear=nn.Linear(8, 6, bias=bias), norm=nn.BatchNorm1d(6)), X)
    own = "linear.weight, linear.bias" if bias else "linear.weight"
    of = f"{own}, norm.weight, norm.bias, norm.running_mean, norm.running_var"
    ran.becomes(
        f"""
        %0 = linear(x, <batch norm folded: {of}>, <batch norm folded: {of}>)
        return %0
        """
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_in_front(bias: bool) -> None:
    ran = run(PASS, program(norm_in_front, linear=nn.Linear(8, 6, bias=bias), norm=nn.BatchNorm1d(8)), X)
    ran.counts(batch_norm=0, linear=1)


def test_a_norm_without_weights() -> None:
    norm = nn.BatchNorm1d(6, affine=False)
    run(PASS, program(norm_behind, linear=nn.Linear(8, 6), norm=norm), X).counts(batch_norm=0)


def test_tokens_flattened_or_transposed_for_the_norm() -> None:
    def forward(m, x):
        y = m.norm(m.linear(x).transpose(1, 2)).transpose(1, 2)
        flat = m.norm(m.linear(x.sin()).reshape(-1, 6))
        return y, flat.view(2, 5, 6)

    model = program(forward, linear=nn.Linear(8, 6), norm=nn.BatchNorm1d(6))
    run(PASS, model, randn(2, 5, 8)).counts(batch_norm=0, linear=2)


def test_a_norm_between_two_projections_goes_into_the_first() -> None:
    def forward(m, x):
        return m.two(m.norm(m.one(x)))

    layers = {"one": nn.Linear(8, 6), "norm": nn.BatchNorm1d(6), "two": nn.Linear(6, 5)}
    ran = run(PASS, program(forward, **layers), X).counts(batch_norm=0, linear=2)
    assert sum(bool(constant.how) for constant in ran.graph.constants.values()) == 2


def test_a_norm_goes_into_the_second_when_the_first_is_read_elsewhere() -> None:
    def forward(m, x):
        y = m.one(x)
        return m.two(m.norm(y)), y

    layers = {"one": nn.Linear(8, 6), "norm": nn.BatchNorm1d(6), "two": nn.Linear(6, 5)}
    run(PASS, program(forward, **layers), X).counts(batch_norm=0, linear=2)


def test_a_second_reader_is_refused() -> None:
    def forward(m, x):
        y = m.linear(x)
        return m.norm(y), y

    run(PASS, program(forward, linear=nn.Linear(8, 6), norm=nn.BatchNorm1d(6)), X).refuses(
        "linear is also read by output"
    )


def test_weights_that_are_inputs_are_refused() -> None:
    def forward(m, x, w, gamma, mean):
        one = F.batch_norm(F.linear(x, w), m.mean, m.var)
        two = F.batch_norm(F.linear(x, m.w), mean, m.var)
        return one, two, F.batch_norm(F.linear(x, m.w), m.mean, m.var, weight=gamma)

    model = program(forward, w=randn(6, 8), mean=randn(6), var=torch.rand(6) + 0.5)
    ran = run(PASS, model, X, randn(6, 8), randn(6), randn(6, seed=1), redraw=False)
    ran.refuses("^w is not a constant").refuses("^gamma is not a constant").refuses("^mean is not a constant")


def test_a_norm_over_positions_is_refused() -> None:
    def forward(m, x):
        return m.norm(m.linear(x))

    ran = run(PASS, program(forward, linear=nn.Linear(8, 6), norm=nn.BatchNorm1d(5)), randn(2, 5, 8))
    ran.refuses("the constant differs along dimension 1, not only by channel")


def test_statistics_of_the_batch_stay() -> None:
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    run(PASS, program(norm_behind, linear=nn.Linear(8, 6), norm=norm), X).stays()


def test_half_precision() -> None:
    model = program(norm_behind, linear=nn.Linear(8, 6), norm=nn.BatchNorm1d(6)).bfloat16()
    run(PASS, model, X.bfloat16()).counts(batch_norm=0)


def test_dynamic_sizes() -> None:
    model = program(norm_behind, linear=nn.Linear(8, 6), norm=nn.BatchNorm1d(6))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch"}}).counts(batch_norm=0)
    ran.agrees(randn(3, 8)).agrees(randn(1, 8))
