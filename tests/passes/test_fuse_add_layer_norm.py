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


def test_a_residual_that_is_broadcast() -> None:
    def forward(m, x, r):
        return [m.norm(x + part) for part in (r[:1], r[0], r[0, 0], r[..., :1])]

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R)
    ran.counts(add_layer_norm=4, layer_norm=0, add=0)


def test_a_residual_that_comes_first_and_is_broadcast() -> None:
    def forward(m, x, r):
        return m.norm(r[:1] + x)

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R).becomes("""
        %0 = slice(r, 0, 0, 1)
        %1 = graphopt.add_layer_norm(x, %0, norm.weight, norm.bias, 1e-05)
        %2 = getitem(%1, 0)
        return %2
    """)


def test_positions_that_are_weights() -> None:
    def forward(m, x):
        total = x + m.positions
        return m.norm(total), total

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8), positions=randn(1, 5, 8)), X)
    ran.counts(add_layer_norm=1, layer_norm=0, add=0)


def test_summands_that_are_both_broadcast_are_refused() -> None:
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8)), X[:1], R[:, :1])
    ran.refuses(r"no summand has the shape of the sum .*: \[1, 5, 8\] and \[2, 1, 8\]")


def test_a_sum_behind_a_reshape() -> None:
    def forward(m, x, r):
        total = (x + r).reshape(-1, 8)
        return m.norm(total), total

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R).becomes("""
        %0 = graphopt.add_layer_norm(x, r, norm.weight, norm.bias, 1e-05)
        %1 = getitem(%0, 0)
        %2 = reshape(%1, [10, 8])
        %3 = getitem(%0, 1)
        %4 = reshape(%3, [10, 8])
        return %2, %4
    """)


def test_a_reshape_that_cuts_rows_stays() -> None:
    def forward(m, x, r):
        return m.norm((x + r).reshape(-1, 4))

    run(PASS, program(forward, norm=nn.LayerNorm(4)), X, R).stays()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_branch_of_fewer_bits(dtype: torch.dtype) -> None:
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8)), X.to(dtype), R)
    ran.becomes("""
        %0 = graphopt.add_layer_norm(r, x, norm.weight, norm.bias, 1e-05)
        %1 = getitem(%0, 0)
        return %1
    """)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_residual_of_more_bits_than_the_norm(dtype: torch.dtype) -> None:
    def forward(m, x, r):
        total = x + r
        return m.norm(total.to(x.dtype)), total

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8).to(dtype)), X.to(dtype), R)
    ran.counts(add_layer_norm=1, layer_norm=0, add=0, to=0)


def test_a_broadcast_branch_of_fewer_bits_is_refused() -> None:
    def forward(m, x, r):
        return m.norm((x + r).to(x.dtype))

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8).bfloat16()), X[:1].bfloat16(), R)
    ran.refuses("no summand has the shape of the sum and the type of its norm")


def test_halves_of_different_kind_are_refused() -> None:
    def forward(m, x, r):
        return m.norm((x + r).to(x.dtype))

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8).bfloat16()), X.bfloat16(), R.half())
    ran.refuses("the summands differ in type: torch.bfloat16 and torch.float16")


def test_a_norm_of_another_type_is_refused() -> None:
    def forward(m, x, r):
        return m.norm((x + r).bfloat16())

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8).bfloat16()), X, R)
    ran.refuses("the norm is torch.bfloat16, the summands are torch.float32 and torch.float32")


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


def test_dynamic_positions() -> None:
    names = {"x": {0: "batch"}}
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8)), X, R[:1], dynamic=names)
    ran.counts(add_layer_norm=1).agrees(randn(4, 5, 8), R[:1]).agrees(randn(1, 5, 8), R[:1])


def test_dynamic_sizes_behind_a_reshape() -> None:
    def forward(m, x, r):
        total = (x + r).reshape(-1, 8)
        return m.norm(total) + total

    names = {0: "batch", 1: "seq"}
    ran = run(PASS, program(forward, norm=nn.LayerNorm(8)), X, R, dynamic={"x": names, "r": names})
    ran.counts(add_layer_norm=1).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))


def test_dynamic_sizes_that_are_both_broadcast_are_refused() -> None:
    dynamic = {"x": {1: "seq"}, "r": {0: "batch"}}
    ran = run(PASS, program(norm_of_sum, norm=nn.LayerNorm(8)), X[:1], R[:, :1], dynamic=dynamic)
    ran.refuses("no summand has the shape of the sum").agrees(randn(1, 3, 8), randn(4, 1, 8))
