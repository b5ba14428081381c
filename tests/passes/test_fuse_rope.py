from __future__ import annotations

import pytest
import torch
from transformers.models.glm.modeling_glm import rotate_half as rotate_neighbours
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

from graphopt.kernels.rope import OP as ROPE
from graphopt.passes import fold_constants, merge_common_subexpressions, remove_noops
from graphopt.passes.fuse_rope import PASS
from tests._models import randn
from tests.passes._harness import Ran, program, run

X = randn(2, 3, 5, 8)  # (batch, heads, tokens, features)
PASSES = [remove_noops.PASS, fold_constants.PASS, merge_common_subexpressions.PASS, PASS]


def tables(tokens: int, pairs: int = 4, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as (tokens, 2 * pairs), every angle twice, as transformers makes them."""
    angles = torch.arange(tokens)[:, None] * 100.0 ** -torch.linspace(0, 1, pairs)
    twice = torch.cat((angles, angles), dim=-1)
    return twice.cos() * scale, twice.sin() * scale


def turned(m, x):
    cos, sin = tables(x.shape[2])
    return x * cos + rotate_half(x) * sin


def ropes(ran: Ran) -> int:
    return sum(node.target is ROPE.overload for node in ran.graph.calls)


def test_heads_first_is_transposed_around_the_op() -> None:
    def forward(m, x, cos, sin):
        cos, sin = (torch.cat([t, t], dim=-1)[:, None] for t in (cos, sin))
        return x * cos + rotate_half(x) * sin

    run(PASS, program(forward), X, randn(2, 5, 4), randn(2, 5, 4, seed=1)).becomes("""
        %0 = cat([cos, cos], -1)
        %1 = unsqueeze(%0, 1)
        %2 = cat([sin, sin], -1)
        %3 = unsqueeze(%2, 1)
        %4 = squeeze(%1, 1)
        %5 = slice(%4, 2, 0, 4)
        %6 = squeeze(%3, 1)
        %7 = slice(%6, 2, 0, 4)
        %8 = transpose(x, 1, 2)
        %9 = graphopt.rope(%8, %5, %7)
        %10 = transpose(%9, 1, 2)
        return %10
    """)
