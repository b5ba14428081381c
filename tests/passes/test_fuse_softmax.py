from __future__ import annotations

import pytest
import torch

from graphopt.passes.fuse_softmax import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)

SPELLINGS = {
    "max": lambda x: (x - x.max(-1, keepdim=True).values).exp(),
    "amax": lambda x: torch.exp(x - x.amax(dim=2, keepdim=True)),
    "max, unsqueezed": lambda x: torch.exp(x - x.max(-1)[0].unsqueeze(-1)),
}


def test_exponentials_divided_by_their_sum() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(dim=-1, keepdim=True))
        return e / e.sum(dim=-1, keepdim=True)

    run(PASS, program(forward), X).becomes(
        before="""
            %0 = amax(x, [-1], True)
            %1 = sub(x, %0)
            %2 = exp(%1)
            %3 = sum(%2, [-1], True)
            %4 = div(%2, %3)
            return %4
        """,
        expected="""
            %0 = softmax(x, 2)
            return %0
        """,
    )


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    def forward(m, x):
        e, f, g = (SPELLINGS[name](x * i) for i in (1, 2, 3))
        return e / e.sum(-1, keepdim=True), f * f.sum(-1, True).reciprocal(), g / g.sum(2)[..., None]

    run(PASS, program(forward), X).counts(softmax=3, exp=0)


def test_logarithms_undone() -> None:
    def forward(m, x):
        return x.log_softmax(-1).exp(), torch.exp(x - x.logsumexp(1, keepdim=True))

    run(PASS, program(forward), X).counts(softmax=2, exp=0)


def test_without_a_maximum_is_refused() -> None:
    def forward(m, x):
        return x.exp() / x.exp().sum(-1, keepdim=True), x.exp()

    def once(m, x):
        e = x.exp()
        return e / e.sum(-1, keepdim=True)

    run(PASS, program(forward), X).stays()
    run(PASS, program(once), X).refuses("its own maximum is not subtracted first")


def test_the_maximum_of_something_else_is_refused() -> None:
    def forward(m, x):
        e, f = torch.exp(x - x.amax(1, keepdim=True)), torch.exp(x - (2 * x).amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True), f / f.sum(-1, keepdim=True)

    run(PASS, program(forward), X).refuses("its own maximum is not subtracted first")


def test_exponentials_that_are_read_twice_are_refused() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True) + e

    run(PASS, program(forward), X).refuses("exp is also read by add")


def test_dynamic_sizes() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch", 2: "width"}})
    ran.counts(softmax=1).agrees(randn(3, 5, 2))
