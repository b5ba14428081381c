from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.default import pipeline
from graphopt.passes.fuse_group_norm_silu import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 8, 4, 6)
W, B = randn(8), randn(8, seed=1)


def test_a_norm_and_its_activation_are_one_op() -> None:
    def forward(m, x):
        return F.silu(F.group_norm(x, 2, m.w, m.b, 1e-6))

    run(PASS, program(forward, w=W, b=B), X).becomes(
        before="""
            %0 = group_norm(x, 2, w, b, 1e-06, False)
            %1 = silu(%0)
            return %1
        """,
        expected="""
            %0 = graphopt.group_norm_silu(x, 2, w, b, 1e-06)
            return %0
        """,
    )


def test_without_weight_and_bias() -> None:
    def forward(m, x):
        return F.silu(F.group_norm(x, 4))

    run(PASS, program(forward), X).counts(group_norm_silu=1)


def test_everything_spelled_out() -> None:
    def forward(m, x):
        b, c, h, w = x.shape
        y = x.reshape(b, 2, c // 2, h, w)
        var, mean = torch.var_mean(y, (2, 3, 4), correction=0, keepdim=True)
        y = ((y - mean) * torch.rsqrt(var + 1e-5)).reshape(b, c, h, w)
        y = y * m.w[:, None, None] + m.b[:, None, None]
        return y / (1 + torch.exp(-y))

    model = program(forward, w=W, b=B)
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    run(pipeline(), model, X).counts(group_norm_silu=1, exp=0, div=0, mul=0)
    run(pipeline(), model, X, dynamic=dynamic).counts(group_norm_silu=1, exp=0, div=0, mul=0)


class Block(nn.Module):
    """A residual block of a diffusion model's U-Net, with its time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)])
        self.time = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = self.convs[0](F.silu(self.norms[0](x))) + self.time(F.silu(t))[:, :, None, None]
        return x + self.convs[1](F.silu(self.norms[1](y)))


def test_a_block_of_a_diffusion_model() -> None:
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}, "t": {0: "batch"}}
    ran = run(pipeline(), Block(), X, randn(2, 5), dynamic=dynamic)
    ran.counts(group_norm_silu=2, group_norm=0, silu=1).agrees(randn(3, 8, 5, 3), randn(3, 5))


def test_a_norm_that_others_read_is_refused() -> None:
    def forward(m, x):
        y = F.group_norm(x, 2, m.w, m.b)
        return F.silu(y), y

    run(PASS, program(forward, w=W, b=B), X).refuses("group_norm is also read by output")


def test_a_weight_of_another_type_is_refused() -> None:
    def forward(m, x):
        return F.silu(F.group_norm(x, 2, m.w, m.b))

    model = program(forward, w=W, b=B)
    run(PASS, model, X.bfloat16()).refuses("the weight is torch.float32, the tensor torch.bfloat16")


def test_other_activations_stay() -> None:
    def forward(m, x):
        return F.relu(F.group_norm(x, 2, m.w, m.b)), F.silu(F.instance_norm(x))

    run(PASS, program(forward, w=W, b=B), X).stays()


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return F.silu(F.group_norm(x, 2, m.w, m.b))

    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    ran = run(PASS, program(forward, w=W, b=B), X, dynamic=dynamic)
    ran.counts(group_norm_silu=1, group_norm=0).agrees(randn(3, 8, 5, 3))
