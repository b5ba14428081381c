from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graphopt.ir import provenance
from graphopt.passes import fuse_add_rms_norm, fuse_rms_norm
from graphopt.passes.fuse_rms_norm_add import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, R = randn(2, 5, 8), randn(2, 5, 8, seed=1)
PASSES = [fuse_rms_norm.PASS, PASS]


def sum_of_norm(m, x, r):
    return r + m.norm(x)


def test_a_sum_of_a_norm() -> None:
    before = """
        %0 = rms_norm(x, [8], norm.weight, 1e-06)
        %1 = add(r, %0)
        return %1
    """
    model = program(sum_of_norm, norm=torch.nn.RMSNorm(8, eps=1e-6))
    run(PASSES, model, X, R).becomes(
        """
        %0 = graphopt.rms_norm_add(x, r, norm.weight, 1e-06)
        return %0
        """,
        before,
    )


def test_the_norm_may_come_first_or_have_no_weight() -> None:
    def forward(m, x, r):
        return F.rms_norm(x, (8,), eps=1e-6) + r

    run(PASSES, program(forward), X, R).becomes("""
        %0 = graphopt.rms_norm_add(x, r, None, 1e-06)
        return %0
    """)


def test_where_it_comes_from() -> None:
    ran = run(PASSES, program(sum_of_norm, norm=LlamaRMSNorm(8)), X, R)
    place = provenance.of(ran.graph.calls[0])
    assert set(place.origins) == {node.name for node in ran.captured.calls}


def test_a_stream_of_two_blocks() -> None:
    def forward(m, x):
        x = x + m.one(m.inner(x))
        return x + m.two(m.outer(x))

    linear = torch.nn.Linear(8, 8)
    weights = {
        "one": LlamaRMSNorm(8),
        "two": LlamaRMSNorm(8),
        "inner": linear,
        "outer": torch.nn.Linear(8, 8),
    }
    run(PASSES, program(forward, **weights), X).counts(rms_norm_add=2, rms_norm=0, add=0)


def test_of_two_norms_one_is_added_to_the_other() -> None:
    def forward(m, x, r):
        normed = m.one(x)
        return normed + m.two(r), normed

    ran = run(PASSES, program(forward, one=LlamaRMSNorm(8), two=LlamaRMSNorm(8)), X, R)
    ran.becomes("""
        %0 = graphopt.rms_norm(x, one.weight, 1e-06)
        %1 = graphopt.rms_norm_add(r, %0, two.weight, 1e-06)
        return %1, %0
    """)


def test_a_norm_between_two_sums_takes_the_one_behind() -> None:
    """Two tensors are written with the other sum instead, three with this one alone."""

    def forward(m, x, r):
        total = x + r
        return total + m.norm(total)

    ran = run([*PASSES, fuse_add_rms_norm.PASS], program(forward, norm=LlamaRMSNorm(8)), X, R)
    ran.counts(rms_norm_add=1, add=1, add_rms_norm=0)


def test_a_residual_that_is_broadcast() -> None:
    for shape in ((1, 5, 8), (5, 8), (8,)):
        ran = run(PASSES, program(sum_of_norm, norm=LlamaRMSNorm(8)), X, randn(*shape))
        ran.counts(rms_norm_add=1, rms_norm=0, add=0)


def test_a_norm_that_is_broadcast_is_refused() -> None:
    ran = run(PASSES, program(sum_of_norm, norm=LlamaRMSNorm(8)), X[:1], R)
    ran.refuses(r"the norm has not the shape of the sum: \[1, 5, 8\] and \[2, 5, 8\]")


def test_a_norm_that_others_read_is_refused() -> None:
    def forward(m, x, r):
        normed = m.norm(x)
        return r + normed, normed.sin()

    run(PASSES, program(forward, norm=LlamaRMSNorm(8)), X, R).refuses("rms_norm.* is also read by sin")


def test_summands_of_integers_are_refused() -> None:
    ran = run(PASSES, program(sum_of_norm, norm=LlamaRMSNorm(8)), X, torch.arange(8)[None])
    ran.refuses("the summands differ in type: torch.float32 and torch.int64")


def test_a_scaled_residual_and_a_literal_stay() -> None:
    def scaled(m, x, r):
        return torch.add(m.norm(x), r, alpha=2)

    def literal(m, x):
        return m.norm(x) + 1

    run(PASSES, program(scaled, norm=LlamaRMSNorm(8)), X, R).stays()
    run(PASSES, program(literal, norm=LlamaRMSNorm(8)), X).stays()


def test_a_residual_in_float32() -> None:
    def forward(m, x, r):
        return r + m.norm(x).float()

    ran = run(PASSES, program(forward, norm=LlamaRMSNorm(8).bfloat16()), X.bfloat16(), R)
    ran.counts(rms_norm_add=1, rms_norm=0, add=0, to=0)


def test_a_cast_that_the_sum_would_not_make_stays() -> None:
    def forward(m, x, r):
        return r + m.norm(x).float()

    ran = run(PASSES, program(forward, norm=LlamaRMSNorm(8).bfloat16()), X.bfloat16(), R.bfloat16())
    ran.counts(rms_norm_add=0, rms_norm=1, add=1)


def test_half_precision_and_a_weight_of_float32() -> None:
    for norm in (LlamaRMSNorm(8).bfloat16(), Gemma2RMSNorm(8)):
        ran = run(PASSES, program(sum_of_norm, norm=norm), X.bfloat16(), R.bfloat16())
        ran.counts(rms_norm_add=1, rms_norm=0)


def test_dynamic_sizes() -> None:
    names = {0: "batch", 1: "seq"}
    ran = run(PASSES, program(sum_of_norm, norm=LlamaRMSNorm(8)), X, R, dynamic={"x": names, "r": names})
    ran.counts(rms_norm_add=1).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))
    ran.agrees(randn(1, 9, 8), randn(1, 9, 8, seed=1))
