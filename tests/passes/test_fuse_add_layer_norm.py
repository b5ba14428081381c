from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertOutput

from graphopt.passes.fuse_add_layer_norm import PASS
from graphopt.passes.remove_noops import PASS as REMOVE_NOOPS
from tests._models import randn
from tests.passes._harness import program, run

X, R = randn(2, 5, 8), randn(2, 5, 8, seed=1)


def norm_of_sum(m, x, r):
    return m.norm(x + r)


def test_a_norm_of_a_sum() -> None:
    run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8, eps=1e-12)), X, R).becomes(
        """
        %0 = graphopt.add_layer_norm(x, r, norm.weight, norm.bias, 1e-12)
        %1 = getitem(%0, 0)
        return %1
        """,
        before="""
        %0 = add(x, r)
        %1 = layer_norm(%0, [8], norm.weight, norm.bias, 1e-12, False)
        return %1
        """,
    )


@pytest.mark.parametrize(
    ("norm", "weights"),
    [
        (nn.LayerNorm(8, bias=False), "norm.weight, None"),
        (nn.LayerNorm(8, elementwise_affine=False), "None, None"),
    ],
)
def test_without_bias_and_weight(norm: nn.Module, weights: str) -> None:
    run(PASS, program(norm_of_sum, norm=norm), X, R).becomes(f"""
        %0 = graphopt.add_layer_norm(x, r, {weights}, 1e-05)
        %1 = getitem(%0, 0)
        return %1
    """)


def test_the_output_of_bert() -> None:
    config = BertConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    model = BertOutput(config).eval()
    ran = run([REMOVE_NOOPS, PASS], model, randn(2, 5, 12), R)
    ran.counts(linear=1, add_layer_norm=1, add=0, layer_norm=0)


def test_a_sum_that_others_read_too() -> None:
    def forward(m, x, r):
        total = x + r
        return m.norm(total) + total, total

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R).becomes("""
        %0 = graphopt.add_layer_norm(x, r, norm.weight, norm.bias, 1e-05)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        %3 = add(%1, %2)
        return %3, %2
    """)


def test_a_chain_of_residuals() -> None:
    def forward(m, x, r):
        one = x + r
        two = one + m.fc(m.first(one))
        return m.second(two) + two

    layers = {"first": nn.LayerNorm(8), "second": nn.LayerNorm(8), "fc": nn.Linear(8, 8)}
    run(PASS, program(forward, **layers), X, R).counts(add_layer_norm=2, add=1, layer_norm=0)


def test_two_norms_of_one_sum() -> None:
    def forward(m, x, r):
        total = x + r
        return m.one(total), m.two(total)

    ran = run(PASS, program(forward, one=nn.LayerNorm(8), two=nn.LayerNorm(8)), X, R)
    ran.counts(add_layer_norm=1, layer_norm=1, add=0)


def test_a_value_added_to_itself() -> None:
    def forward(m, x):
        return m.norm(x + x)

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X).counts(add_layer_norm=1)


def test_two_dimensions_are_refused() -> None:
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm((5, 8))), X, R)
    ran.refuses("2 dimensions are normalised together")


def test_a_residual_that_is_broadcast_is_refused() -> None:
    def forward(m, x, r):
        return [m.norm(x + part) for part in (r[:1], r[0], r[0, 0], r[..., :1])]

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R).refuses("differ in shape")
    assert len(ran.remarks.of_kind("missed")) == 4


def test_summands_of_different_type_are_refused() -> None:
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8)), X, R.bfloat16())
    ran.refuses("the summands differ in type: torch.float32 and torch.bfloat16")


def test_a_scaled_residual_stays() -> None:
    def forward(m, x, r):
        return [m.norm(torch.add(x, r, alpha=alpha)) for alpha in (2, -1, 0)]

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R).stays()


def test_a_difference_stays() -> None:
    def forward(m, x, r):
        return m.norm(x - r)

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R).stays()


def test_a_literal_summand_stays() -> None:
    def forward(m, x):
        return m.norm(x + 1)

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X).stays()


def test_a_group_norm_stays() -> None:
    def forward(m, x, r):
        return F.group_norm(x + r, 1)

    run(PASS, program(forward), X, R).stays()


def test_dynamic_sizes() -> None:
    names = {0: "batch", 1: "seq"}
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8)), X, R, dynamic={"x": names, "r": names})
    ran.counts(add_layer_norm=1).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))
    ran.agrees(randn(1, 9, 8), randn(1, 9, 8, seed=1))


def test_dynamic_positions_are_refused() -> None:
    names = {"x": {0: "batch"}}
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8)), X, R[:1], dynamic=names)
    ran.refuses("the summands differ in shape").agrees(randn(4, 5, 8), R[:1])
