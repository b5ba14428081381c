from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graphopt.passes import fuse_add_rms_norm, fuse_rms_norm, fuse_rms_norm_add
from graphopt.passes.fuse_sandwich_rms_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, R = randn(2, 5, 8), randn(2, 5, 8, seed=1)
PASSES = [fuse_rms_norm.PASS, PASS]


def norms():
    return {"one": LlamaRMSNorm(8), "two": LlamaRMSNorm(8, eps=1e-5)}


def sandwich(m, x, r):
    total = r + m.one(x)
    return m.two(total), total


def test_a_norm_on_either_side_of_a_sum() -> None:
    before = """
        %0 = rms_norm(x, [8], one.weight, 1e-06)
        %1 = add(r, %0)
        %2 = rms_norm(%1, [8], two.weight, 1e-05)
        return %2, %1
    """
    model = program(sandwich, one=torch.nn.RMSNorm(8, 1e-6), two=torch.nn.RMSNorm(8, 1e-5))
    run(PASSES, model, X, R).becomes(
        """
        %0 = graphopt.sandwich_rms_norm(x, r, one.weight, two.weight, 1e-06, 1e-05)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        return %1, %2
        """,
        before,
    )


def test_a_stream_of_two_blocks() -> None:
    def forward(m, x):
        x = x + m.one(m.inner(x))
        return x + m.two(m.outer(m.between(x)))

    linears = {"inner": torch.nn.Linear(8, 8), "outer": torch.nn.Linear(8, 8)}
    every = [*PASSES, fuse_rms_norm_add.PASS, fuse_add_rms_norm.PASS]
    ran = run(every, program(forward, **norms(), between=LlamaRMSNorm(8), **linears), X)
    ran.counts(sandwich_rms_norm=1, rms_norm_add=1, rms_norm=0, add_rms_norm=0, add=0)


def test_the_norm_may_come_first_and_the_sum_be_reshaped() -> None:
    def forward(m, x, r):
        return m.two((m.one(x) + r).view(-1, 8))

    run(PASSES, program(forward, **norms()), X, R).counts(sandwich_rms_norm=1, rms_norm=0, add=0)


def test_a_residual_that_is_broadcast() -> None:
    for shape in ((1, 5, 8), (5, 8), (8,)):
        ran = run(PASSES, program(sandwich, **norms()), X, randn(*shape))
        ran.counts(sandwich_rms_norm=1, rms_norm=0, add=0)


def test_a_norm_that_is_broadcast_is_refused() -> None:
    ran = run(PASSES, program(sandwich, **norms()), X[:1], R)
    ran.refuses(r"the norm has not the shape of the sum: \[1, 5, 8\] and \[2, 5, 8\]")


def test_a_norm_that_others_read_is_refused() -> None:
    def forward(m, x, r):
        normed = m.one(x)
        return m.two(r + normed), normed.sin()

    run(PASSES, program(forward, **norms()), X, R).refuses("rms_norm.* is also read by sin")


def test_summands_of_integers_are_refused() -> None:
    ran = run(PASSES, program(sandwich, **norms()), X, torch.arange(8)[None])
    ran.refuses("the summands differ in type: torch.float32 and torch.int64")


def test_norms_of_two_types_are_refused() -> None:
    def forward(m, x, r):
        return m.two(r + m.one(x).float())

    ran = run(PASSES, program(forward, one=LlamaRMSNorm(8).bfloat16(), two=LlamaRMSNorm(8)), X.bfloat16(), R)
    ran.refuses("the norms are torch.bfloat16 and torch.float32")


def test_half_precision_and_a_residual_in_float32() -> None:
    def forward(m, x, r):
        total = r + m.one(x).float()
        return m.two(total.to(x.dtype)), total

    half = {name: norm.bfloat16() for name, norm in norms().items()}
    run(PASSES, program(sandwich, **half), X.bfloat16(), R.bfloat16()).counts(sandwich_rms_norm=1, rms_norm=0)
    ran = run(PASSES, program(forward, **half), X.bfloat16(), R)
    ran.counts(sandwich_rms_norm=1, rms_norm=0, add=0, to=0)


def test_dynamic_sizes() -> None:
    names = {0: "batch", 1: "seq"}
    ran = run(PASSES, program(sandwich, **norms()), X, R, dynamic={"x": names, "r": names})
    ran.counts(sandwich_rms_norm=1).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))
    ran.agrees(randn(1, 9, 8), randn(1, 9, 8, seed=1))
