from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graphopt.ir import provenance
from graphopt.passes import fuse_rms_norm
from graphopt.passes.fuse_add_rms_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, R = randn(2, 5, 8), randn(2, 5, 8, seed=1)
PASSES = [fuse_rms_norm.PASS, PASS]


def norm_of_sum(m, x, r):
    return m.norm(x + r)


def test_a_norm_of_a_sum() -> None:
    run(PASSES, program(norm_of_sum, norm=LlamaRMSNorm(8)), X, R).becomes("""
        %0 = graphopt.add_rms_norm(x, r, norm.weight, 1e-06)
        %1 = getitem(%0, 0)
        return %1
    """)


def test_a_sum_that_others_read_too() -> None:
    def forward(m, x, r):
        total = x + r
        return m.norm(total), total.sin(), total

    run(PASSES, program(forward, norm=LlamaRMSNorm(8)), X, R).becomes("""
        %0 = graphopt.add_rms_norm(x, r, norm.weight, 1e-06)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        %3 = sin(%2)
        return %1, %3, %2
    """)


def test_where_it_comes_from() -> None:
    ran = run(PASSES, program(norm_of_sum, norm=LlamaRMSNorm(8)), X, R)
    place = provenance.of(ran.graph.calls[0])
    assert place.module == "norm"
    assert place.module_type.endswith("LlamaRMSNorm")
    assert set(place.origins) == {node.name for node in ran.captured.calls}


def test_two_norms_of_one_sum() -> None:
    def forward(m, x, r):
        total = x + r
        return m.one(total), m.two(total)

    ran = run(PASSES, program(forward, one=LlamaRMSNorm(8), two=LlamaRMSNorm(8)), X, R)
    ran.counts(add_rms_norm=1, rms_norm=1, add=0)


def test_a_residual_that_is_broadcast() -> None:
    def forward(m, x, r):
        return [m.norm(x + part) for part in (r[:1], r[0], r[0, 0])]

    ran = run(PASSES, program(forward, norm=LlamaRMSNorm(8)), X, R)
    ran.counts(add_rms_norm=3, rms_norm=0, add=0)


def test_summands_that_are_both_broadcast_are_refused() -> None:
    ran = run(PASSES, program(norm_of_sum, norm=LlamaRMSNorm(8)), X[:1], R[:, :1])
    ran.refuses(r"no summand has the shape of the sum .*: \[1, 5, 8\] and \[2, 1, 8\]")


def test_a_sum_behind_a_reshape() -> None:
    def forward(m, x, r):
        total = (x + r).view(-1, 8)
        return m.norm(total) + total

    ran = run(PASSES, program(forward, norm=LlamaRMSNorm(8)), X, R)
    ran.counts(add_rms_norm=1, rms_norm=0, add=1)


def test_a_residual_in_float32() -> None:
    def forward(m, x, r):
        total = r.float() + x
        return m.norm(total.to(m.norm.weight.dtype)), total

    ran = run(PASSES, program(forward, norm=LlamaRMSNorm(8).bfloat16()), X.bfloat16(), R)
    ran.counts(add_rms_norm=1, rms_norm=0, add=0)


def test_summands_of_integers_are_refused() -> None:
    ran = run(PASSES, program(norm_of_sum, norm=LlamaRMSNorm(8)), X, torch.arange(8)[None])
    ran.refuses("the summands differ in type: torch.float32 and torch.int64")


def test_a_scaled_residual_stays() -> None:
    def forward(m, x, r):
        return m.norm(torch.add(x, r, alpha=2))

    run(PASSES, program(forward, norm=LlamaRMSNorm(8)), X, R).stays()


def test_a_literal_summand_stays() -> None:
    def forward(m, x):
        return m.norm(x + 1)

    run(PASSES, program(forward, norm=LlamaRMSNorm(8)), X).stays()


def test_half_precision() -> None:
    ran = run(PASSES, program(norm_of_sum, norm=LlamaRMSNorm(8).bfloat16()), X.bfloat16(), R.bfloat16())
    ran.counts(add_rms_norm=1, add=0)


def test_dynamic_sizes() -> None:
    names = {0: "batch", 1: "seq"}
    ran = run(PASSES, program(norm_of_sum, norm=LlamaRMSNorm(8)), X, R, dynamic={"x": names, "r": names})
    ran.counts(add_rms_norm=1).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))
    ran.agrees(randn(1, 9, 8), randn(1, 9, 8, seed=1))


def test_a_dynamic_residual_that_is_broadcast() -> None:
    names = {"x": {0: "batch", 1: "seq"}}
    ran = run(PASSES, program(norm_of_sum, norm=LlamaRMSNorm(8)), X, R[:1, :1], dynamic=names)
    ran.counts(add_rms_norm=1).agrees(randn(3, 2, 8), R[:1, :1]).agrees(randn(1, 1, 8), R[:1, :1])
