from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ir import provenance
from graphopt.passes.merge_common_subexpressions import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(3, 4)


def test_the_same_twice_is_computed_once() -> None:
    def forward(m, x):
        return x.sin() + x.sin() * x.sin()

    run(PASS, program(forward), X).becomes("""
        %0 = sin(x)
        %1 = mul(%0, %0)
        %2 = add(%0, %1)
        return %2
    """)


def test_chains() -> None:
    def forward(m, x):
        return torch.cat([(x.sin() + m.w).exp(), (x.sin() + m.w).exp()], dim=1)

    run(PASS, program(forward, w=randn(4)), X).becomes("""
        %0 = sin(x)
        %1 = add(%0, w)
        %2 = exp(%1)
        %3 = cat([%2, %2], 1)
        return %3
    """)


def test_several_results() -> None:
    def forward(m, x):
        one, two = x.split(2, dim=1), x.split(2, dim=1)
        return one[0] + two[1], one[1] * two[0]

    run(PASS, program(forward), X).counts(split=1, getitem=2)


def test_the_first_keeps_its_place() -> None:
    def forward(m, x):
        first = x.sin()
        return first, x.sin()

    ran = run(PASS, program(forward), X)
    (sin,) = ran.graph.calls
    assert provenance.of(sin).line == forward.__code__.co_firstlineno + 1


def test_what_differs_stays() -> None:
    def forward(m, x):
        return (
            *(x.sum(0), x.sum(1), x.sum(0, keepdim=True)),
            *(x + 1, x + 1.0, x + True, torch.add(x, 1, alpha=2)),
            *(x * 0.0, x * -0.0, x / 2, x * 2),
            *(x - m.w, m.w - x, x - m.v),
            *(x.to(torch.float64), x.to(torch.float16)),
        )

    run(PASS, program(forward, w=randn(4), v=randn(4)), X).stays()


def test_zeros_of_either_sign_stay_apart() -> None:
    def forward(m, x):
        return 1 / torch.full((2,), 0.0), 1 / torch.full((2,), -0.0)

    run(PASS, program(forward), X).stays()


def test_randomness_stays() -> None:
    def forward(m, x):
        noise = torch.rand_like(x) - torch.rand_like(x)
        dropped = F.dropout(x, 0.5, True) - F.dropout(x, 0.5, True)
        return noise.abs().sum() > 1e-3, dropped.abs().sum() > 1e-3

    run(PASS, program(forward), X).stays()


def test_tied_weights() -> None:
    def forward(m, x):
        return F.linear(x, m.w), F.linear(x, m.v)

    shared = torch.nn.Parameter(randn(2, 4), requires_grad=False)
    model = program(forward)
    model.w = model.v = shared
    run(PASS, model, X).counts(linear=1)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return (
            x * torch.arange(x.shape[1]),
            x + torch.arange(x.shape[1]),
            x + torch.arange(x.shape[0])[:, None],
        )

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(arange=2).agrees(randn(5, 2)).agrees(randn(4, 4))


def test_two_modules_that_compute_the_same() -> None:
    """Their weights are tied: all that the second computes, the first has computed."""

    class Block(torch.nn.Module):
        def __init__(self, shared: torch.nn.Linear) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(4, elementwise_affine=False)
            self.fc = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gelu(self.fc(self.norm(x)))

    def forward(m, x):
        return m.left(x) + m.right(x), m.other(x)

    shared = torch.nn.Linear(4, 4)
    blocks = {"left": Block(shared), "right": Block(shared), "other": Block(torch.nn.Linear(4, 4))}
    run(PASS, program(forward, **blocks), X).counts(layer_norm=1, linear=2, gelu=2)
