"""Gated MLPs of experts whose rows are in groups: ``fuse_gated_mlp`` gives them an op of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from graphopt.kernels import grouped_gated_mlp as grouped
from graphopt.passes.fuse_gated_mlp import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, W = randn(7, 8), randn(3, 8, 24, seed=1)
ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)
BATCHED = randn(3, 5, 8)


def test_the_halves_of_a_grouped_product() -> None:
    def forward(m, x):
        gate, up = F.grouped_mm(x, m.w, offs=m.ends).chunk(2, dim=-1)
        return F.silu(gate) * up

    run(PASS, program(forward, w=W.bfloat16(), ends=ENDS), X.bfloat16()).becomes(
        """
        %0 = graphopt.grouped_gated_mlp(x, w, ends, silu, False)
        return %0
        """,
        """
        %0 = _grouped_mm(x, w, ends)
        %1 = split(%0, 12, -1)
        %2 = getitem(%1, 0)
        %3 = getitem(%1, 1)
        %4 = silu(%2)
        %5 = mul(%4, %3)
        return %5
        """,
    )


def test_the_halves_of_a_batched_product_the_other_way_round() -> None:
    def forward(m, x):
        product = torch.bmm(x, m.w)
        return product[..., :12] * F.gelu(product[..., 12:])

    run(PASS, program(forward, w=W), BATCHED).becomes("""
        %0 = graphopt.grouped_gated_mlp(x, w, None, gelu, True)
        return %0
    """)


def test_mixtral() -> None:
    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    run(PASS, MixtralSparseMoeBlock(config), randn(2, 5, 8)).counts(grouped_gated_mlp=1, silu=0, mul=1)


def test_weights_in_two_tensors_are_refused() -> None:
    def forward(m, x):
        return F.silu(torch.bmm(x, m.gate)) * torch.bmm(x, m.up)

    ran = run(PASS, program(forward, gate=W, up=randn(3, 8, 24, seed=2)), BATCHED)
    ran.refuses("gate and up weights are two tensors, not one")


def test_parts_that_are_no_halves_are_refused() -> None:
    def forward(m, x):
        product = torch.bmm(x, m.w)
        return F.silu(product[..., ::2]) * product[..., 1::2]

    run(PASS, program(forward, w=W), BATCHED).refuses("gate and up are not the halves")


def test_groups_along_the_summed_dimension_are_refused() -> None:
    def forward(m, x):
        gate, up = F.grouped_mm(x, m.w, offs=m.ends).chunk(2, dim=-1)
        return F.silu(gate) * up

    run(PASS, program(forward, w=randn(8, 24).bfloat16(), ends=ENDS), randn(8, 8).bfloat16()).refuses(
        "rows are not in groups"
    )


def test_a_product_that_others_read_is_refused() -> None:
    def forward(m, x):
        gate, up = torch.bmm(x, m.w).chunk(2, dim=-1)
        return F.silu(gate) * up, gate

    run(PASS, program(forward, w=W), BATCHED).refuses("is also read by")


def test_dynamic_sizes() -> None:
    def forward(m, x):
        gate, up = F.grouped_mm(x, m.w, offs=m.ends).chunk(2, dim=-1)
        return F.silu(gate) * up

    ran = run(PASS, program(forward, w=W.bfloat16(), ends=ENDS), X.bfloat16(), dynamic={"x": {0: "rows"}})
    ran.counts(grouped_gated_mlp=1).agrees(randn(7, 8, seed=3).bfloat16())


def test_pytorchs_grouped_product_gives_the_same_with_zeros_behind_the_last_expert() -> None:
    """What runs on a GPU; PyTorch has it for the CPU too."""
    x, weight = torch.randn(8, 16).bfloat16(), torch.randn(3, 16, 32).bfloat16()
    ends = torch.tensor([2, 5, 6], dtype=torch.int32)
    expected = grouped._grouped_product(x, weight, ends)
    torch.testing.assert_close(grouped._on_gpu(x, weight, ends), expected)
