from __future__ import annotations

import torch

from graphopt.passes.fuse_softmax import PASS
from tests._models import randn
from tests.passes._harness import program, run, text

X = randn(3, 5, 7)


def shifted(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.exp(x - x.amax(dim, keepdim=True))


def normalised(e: torch.Tensor) -> torch.Tensor:
    return e / e.sum(-1, keepdim=True)


SOFTMAX = (
    lambda x: normalised(shifted(x)),
    lambda x: normalised((x - x.max(-1, keepdim=True)[0]).exp()),
    lambda x: normalised((x - x.max(-1).values.unsqueeze(-1)).exp()),
    lambda x: normalised(torch.exp(x - x.amax(2)[..., None])),
    lambda x: torch.exp(torch.log_softmax(x, 2)),
    lambda x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
)
LOG_SOFTMAX = (
    lambda x: x - torch.logsumexp(x, -1, keepdim=True),
    lambda x: x - x.logsumexp(-1).unsqueeze(-1),
)


def spelled(*functions):
    def forward(m, x):
        return tuple(function(x) for function in functions)

    return program(forward)


def dims(lines: list[str]) -> list[str]:
    return [line.partition("= ")[2].replace("-1", "2") for line in lines[:-1]]


def test_softmax() -> None:
    ran = run(PASS, spelled(*SOFTMAX), X)
    ran.counts(exp=0, sum=0, sub=0, max=0, amax=0, logsumexp=0)
    assert set(dims(text(ran.graph).splitlines())) == {"softmax(x, 2)"}


def test_the_reciprocal_of_the_sum() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(1, keepdim=True))
        return e * e.sum(1, keepdim=True).reciprocal()

    run(PASS, program(forward), X).becomes("""
        %0 = softmax(x, 1)
        return %0
    """)


def test_log_softmax() -> None:
    ran = run(PASS, spelled(*LOG_SOFTMAX), X)
    assert dims(text(ran.graph).splitlines()) == ["log_softmax(x, 2)"] * 2


def test_log_softmax_from_the_exponential() -> None:
    def forward(m, x):
        centred = x - x.amax(-1, keepdim=True)
        return centred - centred.exp().sum(-1, keepdim=True).log()

    run(PASS, program(forward), X).becomes("""
        %0 = log_softmax(x, 2)
        return %0
    """)


def test_logsumexp() -> None:
    def forward(m, x):
        largest = x.amax(-1, keepdim=True)
        return largest + torch.log(torch.exp(x - largest).sum(-1, keepdim=True))

    run(PASS, program(forward), X).becomes(
        before="""
            %0 = amax(x, [-1], True)
            %1 = sub(x, %0)
            %2 = exp(%1)
            %3 = sum(%2, [-1], True)
            %4 = log(%3)
            %5 = add(%0, %4)
            return %5
        """,
        expected="""
            %0 = logsumexp(x, [2], True)
            return %0
        """,
    )


def test_without_the_maximum_it_is_refused() -> None:
    def forward(m, x):
        e = x.exp()
        return e / e.sum(-1, keepdim=True)

    run(PASS, program(forward), X).refuses("without the maximum subtracted, exp overflows")


def test_the_logarithm_of_softmax_is_refused() -> None:
    def forward(m, x):
        return torch.log(torch.softmax(x, -1))

    run(PASS, program(forward), X).refuses("is -inf where softmax underflows")


def test_an_exponential_that_others_read_is_refused() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True), e

    run(PASS, program(forward), X).refuses("exp is also read by output")


def test_a_sum_along_another_dimension_is_refused() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    run(PASS, program(forward), X).refuses("without the maximum subtracted")


def test_a_sum_that_is_broadcast_along_the_other_dimension_stays() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1)

    run(PASS, program(forward), randn(5, 5)).stays()


def test_a_sum_of_something_else_stays() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum((1, 2), keepdim=True), x / x.sum(-1, keepdim=True)

    run(PASS, program(forward), X).stays()


def test_dynamic_sizes() -> None:
    def forward(m, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch", 2: "keys"}})
    ran.counts(softmax=1, exp=0).agrees(randn(2, 5, 3)).agrees(randn(4, 5, 9))
