from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from graphopt.passes import fold_constants
from graphopt.passes.fuse_rms_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, W = randn(2, 5, 8), randn(8, seed=1)

SPELLINGS = {
    "rsqrt": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "the weight last": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.w,
    "squared by itself": lambda m, x: torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * x * m.w,
    "sqrt": lambda m, x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.w,
    "the last dimension by its number": lambda m, x: (
        x * torch.rsqrt((x**2).mean(2, keepdim=True) + 1e-6) * m.w
    ),
    "torch's own": lambda m, x: F.rms_norm(x, (8,), m.w, 1e-6),
}
OTHERS = {
    "eps as a tensor": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.w[:1].abs())),
    "a cube": lambda m, x: m.w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)),
    "the mean of another value": lambda m, x: (
        m.w * (x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1e-6))
    ),
    "a sum": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)),
    "a doubled eps": lambda m, x: (
        m.w * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2)))
    ),
    "no root": lambda m, x: m.w * (x / (x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "upside down": lambda m, x: m.w * (torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) / (x.abs() + 1)),
}


def each(functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return tuple(function(m, x) for function in functions.values())

    return forward


def test_every_spelling() -> None:
    ran = run(PASS, program(each(SPELLINGS), w=W), X)
    norms = [f"%{i} = graphopt.rms_norm(x, w, 1e-06)" for i in range(6)]
    ran.becomes("\n".join([*norms, "return %0, %1, %2, %3, %4, %5"]))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_of_transformers(kind: type[nn.Module], dtype: torch.dtype) -> None:
    def forward(m, x):
        return m.norm(x)

    ran = run(PASS, program(forward, norm=kind(8).to(dtype)), X.to(dtype))
    ran.becomes("%0 = graphopt.rms_norm(x, norm.weight, 1e-06)\nreturn %0")


def test_the_norm_of_gemma_in_half_precision() -> None:
    def forward(m, x):
        return m.norm(x)

    model = program(forward, norm=GemmaRMSNorm(8).bfloat16())
    run([fold_constants.PASS, PASS], model, X.bfloat16()).counts(rms_norm=1, to=1, type_as=1, mul=0)


def test_torchs_own_without_weight_and_eps() -> None:
    def forward(m, x):
        return F.rms_norm(x, (8,))

    ran = run(PASS, program(forward), X)
    ran.becomes(f"%0 = graphopt.rms_norm(x, None, {torch.finfo(torch.float32).eps:.6g})\nreturn %0")


def test_a_norm_a_head() -> None:
    def forward(m, x):
        return m.norm(x.reshape(2, 5, 2, 4))

    run(PASS, program(forward, norm=LlamaRMSNorm(4)), X).counts(rms_norm=1, reshape=1, rsqrt=0)


def test_a_mean_over_another_dimension_is_refused() -> None:
    def forward(m, x):
        return m.w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))

    run(PASS, program(forward, w=W), X).refuses(r"the mean is over dimensions \[1\], not the last")


def test_a_mean_over_two_dimensions_is_refused() -> None:
    def forward(m, x):
        return m.w * (x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6))

    run(PASS, program(forward, w=W), X).refuses(r"the mean is over dimensions \[-2, -1\], not the last")


def test_two_dimensions_normalised_together_are_refused() -> None:
    def forward(m, x):
        return F.rms_norm(x, (5, 8), m.w)

    run(PASS, program(forward, w=randn(5, 8)), X).refuses("2 dimensions are normalised together")


def test_a_weight_that_is_broadcast_is_refused() -> None:
    run(PASS, program(SPELLINGS["rsqrt"], w=randn(1)), X).refuses("the weight has 1 values for rows of 8")


def test_a_result_of_another_type_is_refused() -> None:
    def forward(m, x):
        return m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    ran = run(PASS, program(forward, w=W), X.bfloat16())
    ran.refuses("the result is torch.float32, not torch.bfloat16")


def test_a_weight_of_another_type_is_refused() -> None:
    def forward(m, x):
        return m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    ran = run(PASS, program(forward, w=W.bfloat16()), X)
    ran.refuses("the weight is torch.bfloat16, not torch.float32")


def test_statistics_that_are_read_by_others_are_refused() -> None:
    def forward(m, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return m.w * (x * scale), scale

    run(PASS, program(forward, w=W), X).refuses("rsqrt is also read by output")


def test_what_only_looks_like_it_stays() -> None:
    run(PASS, program(each(OTHERS), w=W), X).stays()


def test_a_mean_that_loses_its_dimension_stays() -> None:
    def forward(m, x):
        return m.w * (x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6))

    run(PASS, program(forward, w=randn(8)), randn(8, 8)).stays()


def test_one_value_normalised_twice() -> None:
    def forward(m, x):
        return m.one(x), m.two(x), x

    run(PASS, program(forward, one=LlamaRMSNorm(8), two=LlamaRMSNorm(8)), X).counts(rms_norm=2, pow=0)


def test_dynamic_sizes() -> None:
    names = {"x": {0: "batch", 1: "seq"}}
    ran = run(PASS, program(SPELLINGS["rsqrt"], w=W), X, dynamic=names)
    ran.counts(rms_norm=1, pow=0).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))
