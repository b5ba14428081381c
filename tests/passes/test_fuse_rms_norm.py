from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from graphopt.passes.fuse_rms_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, W = randn(2, 5, 8), randn(8, seed=1)
EPS = 1e-6


def square(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True)


SPELLINGS = {
    "rsqrt": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "the weight last": lambda m, x: x * torch.rsqrt(square(x) + EPS) * m.w,
    "the weight first": lambda m, x: m.w * x * torch.rsqrt(square(x) + EPS),
    "the weight on the root": lambda m, x: x * (torch.rsqrt(square(x) + EPS) * m.w),
    "squared by itself": lambda m, x: torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * x * m.w,
    "square": lambda m, x: x * (EPS + x.square().mean(-1, keepdim=True)) ** -0.5 * m.w,
    "sqrt": lambda m, x: x / torch.sqrt(square(x) + EPS) * m.w,
    "a root by a power": lambda m, x: m.w * x / (square(x) + EPS) ** 0.5,
    "the last dimension by its number": lambda m, x: (
        x * torch.rsqrt((x**2).mean(2, keepdim=True) + EPS) * m.w
    ),
    "a sum": lambda m, x: x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) / 8 + EPS) * m.w,
    "a lost dimension": lambda m, x: 1 / torch.sqrt(x.pow(2).mean(-1) + EPS)[..., None] * x * m.w,
    "a dot product": lambda m, x: (
        m.w * x * torch.rsqrt(torch.einsum("bsd,bsd->bs", x, x)[..., None] / 8 + EPS)
    ),
    "a length": lambda m, x: x / torch.sqrt(x.norm(dim=-1, keepdim=True) ** 2 / 8 + EPS) * m.w,
    "scaled": lambda m, x: 8**0.5 * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 8 * EPS) * m.w,
    "expanded": lambda m, x: x * torch.rsqrt(square(x) + EPS).expand_as(x) * m.w,
    "torch's own": lambda m, x: F.rms_norm(x, (8,), m.w, EPS),
    "torch's own, the weight behind": lambda m, x: F.rms_norm(x, (8,), eps=EPS) * m.w,
}
LENGTHS = {  # nothing is added to the mean square
    "norm": lambda m, x: x / (x.norm(dim=-1, keepdim=True) * 8**-0.5) * m.w,
    "linalg.norm": lambda m, x: m.w * (x / torch.linalg.norm(x, dim=-1, keepdim=True) * 8**0.5),
    "vector_norm": lambda m, x: (
        x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).reciprocal() * 8**0.5 * m.w
    ),
}
OTHERS = {
    "eps as a tensor": lambda m, x: m.w * (x * torch.rsqrt(square(x) + m.w[:1].abs())),
    "a cube": lambda m, x: m.w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS)),
    "the mean of another value": lambda m, x: m.w * (x * torch.rsqrt(square(x.sin()) + EPS)),
    "a doubled eps": lambda m, x: m.w * (x * torch.rsqrt(torch.add(square(x), EPS, alpha=2))),
    "no root": lambda m, x: m.w * (x / (square(x) + EPS)),
    "upside down": lambda m, x: m.w * (torch.sqrt(square(x) + EPS) / (x.abs() + 1)),
    "a negative eps": lambda m, x: m.w * (x * torch.rsqrt(square(x) - 1e-9)),
    "another order": lambda m, x: x / x.norm(p=1, dim=-1, keepdim=True) * 8**0.5,
    "a unit length": lambda m, x: x / x.norm(dim=-1, keepdim=True),
    "a unit length, bounded": lambda m, x: F.normalize(x, dim=-1),
    "a variance without centring": lambda m, x: x * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + EPS),
    "the rows of another": lambda m, x: x[:1] * torch.rsqrt(square(x) + EPS),
}


def each(functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return tuple(function(m, x) for function in functions.values())

    return forward


@pytest.mark.parametrize(("spellings", "eps"), [(SPELLINGS, "1e-06"), (LENGTHS, "0")])
def test_every_spelling(spellings: dict, eps: str) -> None:
    ran = run(PASS, program(each(spellings), w=W), X)
    norms = [f"%{i} = graphopt.rms_norm(x, w, {eps})" for i in range(len(spellings))]
    ran.becomes("\n".join([*norms, "return " + ", ".join(f"%{i}" for i in range(len(spellings)))]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_spelling_in_half_precision(dtype: torch.dtype) -> None:
    ran = run(PASS, program(each({**SPELLINGS, **LENGTHS}), w=W).to(dtype), X.to(dtype))
    ran.counts(rms_norm=len(SPELLINGS) + len(LENGTHS), mul=0, to=0)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_of_transformers(kind: type[nn.Module], dtype: torch.dtype) -> None:
    def forward(m, x):
        return m.norm(x)

    ran = run(PASS, program(forward, norm=kind(8).to(dtype)), X.to(dtype))
    ran.becomes("%0 = graphopt.rms_norm(x, norm.weight, 1e-06)\nreturn %0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_gemma(dtype: torch.dtype) -> None:
    def forward(m, x):
        return m.norm(x)

    ran = run(PASS, program(forward, norm=GemmaRMSNorm(8).to(dtype)), X.to(dtype))
    ran.counts(rms_norm=1, add=1, type_as=0, mul=0, to=int(dtype != torch.float32))  # of 1 + w


def test_torchs_own_in_float32() -> None:
    def forward(m, x):
        return F.rms_norm(x.float(), (8,), m.w.float(), EPS).type_as(x)

    ran = run(PASS, program(forward, w=W.bfloat16()), X.bfloat16())
    ran.becomes("%0 = graphopt.rms_norm(x, w, 1e-06)\nreturn %0")


def test_torchs_own_without_weight_and_eps() -> None:
    def forward(m, x):
        return F.rms_norm(x, (8,))

    ran = run(PASS, program(forward), X)
    ran.becomes(f"%0 = graphopt.rms_norm(x, None, {torch.finfo(torch.float32).eps:.6g})\nreturn %0")


def test_no_weight() -> None:
    def forward(m, x):
        return x * torch.rsqrt(square(x) + EPS)

    run(PASS, program(forward), X).becomes("%0 = graphopt.rms_norm(x, None, 1e-06)\nreturn %0")


def test_a_unit_length_with_eps() -> None:
    def forward(m, x):
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)

    run(PASS, program(forward), X).becomes("""
        %0 = graphopt.rms_norm(x, None, 1.25e-07)
        %1 = mul(%0, 0.353553)
        return %1
    """)


def test_a_factor_is_a_factor_of_the_weight() -> None:
    def forward(m, x):
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS) * m.w

    run(PASS, program(forward, w=W), X).becomes("""
        %0 = mul(w, 0.353553)
        %1 = graphopt.rms_norm(x, %0, 1.25e-07)
        return %1
    """)


def test_a_norm_a_head() -> None:
    def forward(m, x):
        return m.norm(x.reshape(2, 5, 2, 4))

    run(PASS, program(forward, norm=LlamaRMSNorm(4)), X).counts(rms_norm=1, reshape=1, rsqrt=0)


def test_another_dimension_is_brought_to_the_end() -> None:
    def forward(m, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * m.w

    run(PASS, program(forward, w=randn(5, 1)), X).becomes("""
        %0 = permute(x, [0, 2, 1])
        %1 = reshape(w, [5])
        %2 = graphopt.rms_norm(%0, %1, 1e-06)
        %3 = permute(%2, [0, 2, 1])
        return %3
    """)


@pytest.mark.parametrize("wide", [True, False])
def test_a_result_of_another_type(wide: bool) -> None:
    """A weight of float32 makes a result of float32; the norm is then taken in that."""

    def forward(m, x):
        return m.w * (x * torch.rsqrt(square(x.float() if wide else x) + EPS)).to(x.dtype)

    ran = run(PASS, program(forward, w=W), X.bfloat16())
    ran.becomes("%0 = to(x, float32)\n%1 = graphopt.rms_norm(%0, w, 1e-06)\nreturn %1")


def test_a_weight_of_fewer_bits_is_cast() -> None:
    ran = run(PASS, program(SPELLINGS["rsqrt"], w=W.bfloat16()), X)
    ran.becomes("%0 = to(w, float32)\n%1 = graphopt.rms_norm(x, %0, 1e-06)\nreturn %1")


def test_a_residual_of_float32() -> None:
    def forward(m, x):
        return m.w * (x * torch.rsqrt(square(x) + EPS)).bfloat16()

    ran = run(PASS, program(forward, w=W.bfloat16()), X)
    ran.counts(rms_norm=1, mul=0, to=2)


def test_one_value_normalised_twice() -> None:
    def forward(m, x):
        return m.one(x), m.two(x), x

    run(PASS, program(forward, one=LlamaRMSNorm(8), two=LlamaRMSNorm(8)), X).counts(rms_norm=2, pow=0)


def test_two_weights_of_one_normalised_value() -> None:
    def forward(m, x):
        normed = x * torch.rsqrt(square(x) + EPS)
        return normed * m.w, normed * m.v

    run(PASS, program(forward, w=W, v=W), X).counts(rms_norm=2, pow=0, mul=0)


def test_a_residual_of_a_vector_stays_outside() -> None:
    def forward(m, x, r):
        return x * torch.rsqrt(square(x) + EPS) * r

    run(PASS, program(forward), X[0, :1], W[None]).counts(rms_norm=1, mul=1)


def test_two_dimensions_are_refused() -> None:
    def forward(m, x):
        own = m.w * (x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS))
        return own, F.rms_norm(x, (5, 8), m.w)

    ran = run(PASS, program(forward, w=randn(5, 8)), X)
    ran.refuses("2 dimensions are normalised together")
    assert len(ran.remarks.of_kind("missed")) == 2


def test_a_weight_of_more_bits_is_refused() -> None:
    def forward(m, x):
        return F.rms_norm(x, (8,), eps=EPS) * m.w

    ran = run(PASS, program(forward, w=W.double()), X)
    ran.counts(rms_norm=1, to=1)

    def narrowed(m, x):
        return (F.rms_norm(x, (8,), eps=EPS) * m.w).float()

    run(PASS, program(narrowed, w=W.double()), X).refuses("the weight is torch.float64, not torch.float32")


def test_statistics_that_are_read_by_others_are_refused() -> None:
    def forward(m, x):
        scale = torch.rsqrt(square(x) + EPS)
        return m.w * (x * scale), scale

    run(PASS, program(forward, w=W), X).refuses("rsqrt is also read by output")


@pytest.mark.parametrize(
    "root", [lambda x: square(x).sqrt() + EPS, lambda x: EPS + x.norm(dim=-1, keepdim=True)]
)
def test_an_eps_outside_the_root_is_refused(root) -> None:
    def forward(m, x):
        return x / root(x) * m.w

    run(PASS, program(forward, w=W), X).refuses("eps is added to the root, not to what it is the root of")


def test_a_bound_is_refused() -> None:
    def forward(m, x):
        return F.normalize(x, dim=-1) * 8**0.5 * m.w

    ran = run(PASS, program(forward, w=W), X)
    ran.refuses("the root is bounded from below, where a norm adds eps")


def test_what_only_looks_like_it_stays() -> None:
    ran = run(PASS, program(each(OTHERS), w=W), X).stays()
    assert not ran.remarks.of_kind("missed")


def test_a_mean_that_loses_its_dimension_stays() -> None:
    def forward(m, x):
        return m.w * (x * torch.rsqrt(x.pow(2).mean(-1) + EPS))

    run(PASS, program(forward, w=randn(8)), randn(8, 8)).stays()


def test_dynamic_sizes() -> None:
    names = {"x": {0: "batch", 1: "seq"}}
    ran = run(PASS, program(SPELLINGS["a lost dimension"], w=W), X, dynamic=names)
    ran.counts(rms_norm=1, pow=0).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))
