from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.passes.default import pipeline
from graphopt.passes.fuse_reduction import PASS
from graphopt.runtime.lower_onnx import to_onnx
from tests._models import bert, randn
from tests.passes._harness import program, run

X, Y, V = randn(2, 5, 8), randn(2, 5, 8, seed=1), randn(8)


def test_a_chain_and_its_sum() -> None:
    def forward(m, x, y):
        return torch.sigmoid(x * y).sum(-1)

    run(PASS, program(forward), X, Y).becomes(
        before="""
            %0 = mul(x, y)
            %1 = sigmoid(%0)
            %2 = sum(%1, [-1])
            return %2
        """,
        expected="""
            %0 = graphopt.pointwise([x, y], %2 = mul(%0, %1)
            %3 = sigmoid(%2, 1.0)
            %4 = sum(%3), 1, False)
            return %0
        """,
    )


def test_rows_divided_by_their_norm() -> None:
    """What sentence embeddings end in: the expansion is no step, since a program broadcasts by itself."""

    def forward(m, x):
        return F.normalize(x, dim=-1)

    run(PASS, program(forward), X).becomes(
        """
            %0 = graphopt.pointwise([x], %1 = norm(%0)
            %2 = maximum(%1, 1e-12)
            %3 = div(%0, %2), 1, True)
            return %0
        """
    )


def test_reductions_of_reductions_are_one_kernel() -> None:
    def forward(m, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.abs().amax(-1, keepdim=True) + 1e-3) * m.v

    run(PASS, program(forward, v=V), X).counts(pointwise=1, mean=0, amax=0, sub=0, div=0, mul=0)


def test_a_softmax_takes_what_stands_around_it() -> None:
    def forward(m, x, y):
        return torch.softmax(x * 0.125 + y, -1) * 2

    run(PASS, program(forward), X, Y).counts(pointwise=1, softmax=0, mul=0, add=0)


def test_an_image_s_mean_over_both_sides() -> None:
    def forward(m, x):
        return torch.relu(x * 2).mean((2, 3))

    ran = run(PASS, program(forward), randn(2, 3, 4, 5)).counts(pointwise=1, relu=0, mean=0)
    assert ran.graph.calls[0].args[2:] == (2, False)


def test_steps_on_sums_whose_dimension_is_gone() -> None:
    def forward(m, x):
        return (x * x).sum(-1).sqrt() * m.s + 1

    run(PASS, program(forward, s=torch.tensor(0.5)), X).counts(pointwise=1, sum=0, sqrt=0, add=0)


def test_what_meets_sums_whose_dimension_is_gone_stays_outside() -> None:
    """Beside (batch, seq) a tensor has other dimensions than beside (batch, seq, features)."""

    def forward(m, x, y):
        return (x * x).sum(-1) * y

    ran = run(PASS, program(forward), X, randn(2, 5)).counts(pointwise=1, sum=0, mul=1)
    assert ran.graph.calls[-1].args[1].name == "y"

    def square(m, x):  # (4, 4) of each: the sums would be taken for a row
        return x + (x * x).sum(-1)

    run(PASS, program(square), randn(4, 4)).counts(pointwise=1, add=1)


def test_a_value_that_others_read_is_refused() -> None:
    def forward(m, x):
        y = x * 2
        return y.sum(-1), y

    run(PASS, program(forward), X).refuses("mul is also read by output")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x * 2).sum(1), "sum is not over the last dimensions"),
        (lambda x: (x * 2).sum((0, 2)), "sum is not over the last dimensions"),
        (lambda x: torch.linalg.vector_norm(x * 2, 1, -1), "the norm is of order 1"),
        (lambda x: (x * 2).sum(-1, dtype=torch.float64), "sum makes torch.float64 of torch.float32"),
        (lambda x: (x[..., :1] * 2).sum(-1), "sum is over one element"),
        (lambda x: torch.erfinv(x.tanh()).sum(-1), "erfinv.default has no name in a program"),
    ],
)
def test_refusals_name_the_reason(function, reason: str) -> None:
    def forward(m, x):
        return function(x)

    missed = [row.reason for row in run(PASS, program(forward), X).stays().remarks.of_kind("missed")]
    assert any(reason in said for said in missed), missed


def test_other_rows_are_two_kernels() -> None:
    def forward(m, x):
        return (x * x.sum((-1, -2), keepdim=True)).exp().sum(-1)

    run(PASS, program(forward), X * 0.01).counts(pointwise=1, exp=0, sum=1)


def test_dynamic_sizes() -> None:
    def forward(m, x, y):
        scaled = F.normalize(x * y, dim=-1)
        return scaled, torch.softmax(x + m.v, -1).amax(-1)

    dynamic = {name: {0: "batch", 1: "seq"} for name in ("x", "y")}
    ran = run(PASS, program(forward, v=V), X, Y, dynamic=dynamic)
    ran.counts(pointwise=2, softmax=0, expand=0).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))


def test_rows_of_dynamic_length() -> None:
    def forward(m, x):
        return torch.softmax(x * 0.5, -1)

    ran = run(PASS, program(forward), X, dynamic={"x": {2: "keys"}})
    ran.counts(pointwise=1).agrees(randn(2, 5, 3))


def test_half_precision() -> None:
    def forward(m, x):
        return (x.float() * 1.5).exp().mean(-1, keepdim=True).to(x.dtype)

    run(PASS, program(forward), X.bfloat16()).counts(pointwise=1, to=0, mean=0)


def test_onnx_has_the_same_nodes() -> None:
    def forward(m, x, y):
        return torch.sigmoid(x * y).sum(-1, keepdim=True)

    ran = run(PASS, program(forward), X, Y).counts(pointwise=1)
    assert [node.op_type for node in to_onnx(ran.graph).graph if node.op_type != "Constant"] == [
        node.op_type for node in to_onnx(ran.captured).graph if node.op_type != "Constant"
    ]


def test_whole_models_at_level_3() -> None:
    run(pipeline(3), bert().model, kwargs=bert().kwargs, redraw=False)
    assert PASS in pipeline(3)
    assert PASS not in pipeline(2)
