from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.fuse_layer_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X, W, B = randn(2, 5, 8), randn(8, seed=1), randn(8, seed=2)
EPS = 1e-5


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(-1, keepdim=True)


def variance(x: torch.Tensor) -> torch.Tensor:
    return x.var(-1, keepdim=True, unbiased=False)


def both_at_once(m, x):
    var, middle = torch.var_mean(x, -1, correction=0)
    return torch.addcmul(m.b, (x - middle[..., None]) * torch.rsqrt(var + EPS).unsqueeze(-1), m.w)


def centred_once(m, x):
    centred = x - mean(x)
    return m.b + m.w * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)


SPELLINGS = {
    "var": lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + EPS) * m.w + m.b,
    "rsqrt": lambda m, x: m.b + m.w * ((x - mean(x)) * torch.rsqrt(EPS + variance(x))),
    "a power": lambda m, x: (x - mean(x)) * (variance(x) + EPS) ** -0.5 * m.w + m.b,
    "var_mean and addcmul": both_at_once,
    "centred once": centred_once,
    "centred twice": lambda m, x: (x - mean(x)) / torch.sqrt(mean((x - mean(x)) ** 2) + EPS) * m.w + m.b,
    "E[x^2] - E[x]^2": lambda m, x: (x - mean(x)) * torch.rsqrt(mean(x * x) - mean(x) ** 2 + EPS) * m.w + m.b,
    "never negative": lambda m, x: (
        (x - mean(x)) * torch.rsqrt((mean(x**2) - mean(x) * mean(x)).clamp(min=0) + EPS) * m.w + m.b
    ),
    "a squared deviation": lambda m, x: (
        (x - mean(x)) / torch.sqrt(x.std(-1, keepdim=True, correction=0) ** 2 + EPS) * m.w + m.b
    ),
    "sums": lambda m, x: (
        (x - x.sum(-1, keepdim=True) / 8)
        / torch.sqrt(((x - mean(x)) ** 2).sum(-1, keepdim=True) / 8 + EPS)
        * m.w
        + m.b
    ),
    "the weight behind": lambda m, x: F.layer_norm(x, (8,), eps=EPS) * m.w + m.b,
    "the bias behind": lambda m, x: F.layer_norm(x, (8,), m.w, eps=EPS) + m.b,
}
OTHERS = {
    "not centred": lambda m, x: x * torch.rsqrt(variance(x) + EPS),
    "another mean": lambda m, x: (x - mean(x.sin())) * torch.rsqrt(variance(x) + EPS),
    "centred wrongly": lambda m, x: (x + mean(x)) * torch.rsqrt(variance(x) + EPS),
    "a scaled mean": lambda m, x: (x - 2 * mean(x)) * torch.rsqrt(variance(x) + EPS),
    "other dimensions": lambda m, x: (x - x.mean(1, keepdim=True)) * torch.rsqrt(variance(x) + EPS),
    "the mean of squares": lambda m, x: (x - mean(x)) * torch.rsqrt(mean(x * x) + EPS),
    "no root": lambda m, x: (x - mean(x)) / (variance(x) + EPS),
    "whole": lambda m, x: F.layer_norm(x, (8,), m.w, m.b, EPS),
    "scaled": lambda m, x: F.layer_norm(x, (8,)) * 2,
    "modulated": lambda m, x: F.layer_norm(x, (8,)) * (1 + x[:, :1]) + x[:, 1:2],
}


def each(functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return tuple(function(m, x) for function in functions.values())

    return forward


def test_every_spelling() -> None:
    ran = run(PASS, program(each(SPELLINGS), w=W, b=B), X)
    names = [f"%{i}" for i in range(len(SPELLINGS))]
    own = ", False"  # the flag of torch's own norms
    norms = [f"{name} = layer_norm(x, [8], w, b, 1e-05)" for name in names]
    ran.becomes("\n".join([*norms, f"return {', '.join(names)}"]).replace(own, ""))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_spelling_in_half_precision(dtype: torch.dtype) -> None:
    ran = run(PASS, program(each(SPELLINGS), w=W, b=B).to(dtype), X.to(dtype))
    ran.counts(layer_norm=len(SPELLINGS), mul=0, sub=0, to=0)


def test_torchs_own_in_float32() -> None:
    def forward(m, x):
        return F.layer_norm(x.float(), (8,), m.w.float(), m.b.float(), EPS).to(x.dtype)

    ran = run(PASS, program(forward, w=W.bfloat16(), b=B.bfloat16()), X.bfloat16())
    ran.becomes("%0 = layer_norm(x, [8], w, b, 1e-05)\nreturn %0")


def test_weights_of_float32_stay_so() -> None:
    def forward(m, x):
        return (F.layer_norm(x.float(), (8,), m.w, m.b, EPS)).to(x.dtype)

    run(PASS, program(forward, w=W, b=B), X.bfloat16()).stays()


def test_a_norm_in_float32_of_bfloat16() -> None:
    def forward(m, x):
        wide = x.float()
        return ((wide - mean(wide)) * torch.rsqrt(variance(wide) + EPS)).to(x.dtype) * m.w + m.b

    ran = run(PASS, program(forward, w=W.bfloat16(), b=B.bfloat16()), X.bfloat16())
    ran.becomes("%0 = layer_norm(x, [8], w, b, 1e-05)\nreturn %0")


def test_neither_weight_nor_bias() -> None:
    def forward(m, x):
        return (x - mean(x)) / torch.sqrt(variance(x) + EPS)

    run(PASS, program(forward), X).becomes("%0 = layer_norm(x, [8], None, None, 1e-05)\nreturn %0")


def test_channels_first() -> None:
    def forward(m, x):
        centred = x - x.mean(1, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + EPS)
        return m.w[:, None, None] * normed + m.b[:, None, None]

    ran = run(PASS, program(forward, w=W, b=B), randn(2, 8, 3, 5))
    ran.counts(layer_norm=1, permute=2, mean=0, mul=0, add=0)


def test_two_dimensions() -> None:
    def forward(m, x):
        return (x - x.mean((1, 2), keepdim=True)) * torch.rsqrt(x.var((1, 2), False, keepdim=True) + EPS)

    run(PASS, program(forward), X).becomes("%0 = layer_norm(x, [5, 8], None, None, 1e-05)\nreturn %0")


@pytest.mark.parametrize("weights", ["w b", "w", "b", ""])
def test_an_unbiased_variance_scales(weights: str) -> None:
    def forward(m, x):
        out = (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + EPS)
        out = out * m.w if "w" in weights else out
        return out + m.b if "b" in weights else out

    ran = run(PASS, program(forward, w=W, b=B), X)
    ran.counts(layer_norm=1, var=0, mul=1, sub=0)


def test_an_eps_outside_the_root_is_refused() -> None:
    def forward(m, x):
        return m.w * (x - mean(x)) / (x.std(-1, keepdim=True) + EPS) + m.b

    ran = run(PASS, program(forward, w=W, b=B), X)
    ran.refuses("eps is added to the root, not to what it is the root of")


def test_a_bound_is_refused() -> None:
    def forward(m, x):
        return (x - mean(x)) / torch.sqrt(variance(x).clamp(min=EPS))

    run(PASS, program(forward), X).refuses("the root is bounded from below, where a norm adds eps")


def test_no_eps_is_refused() -> None:
    def forward(m, x):
        return (x - mean(x)) / x.std(-1, keepdim=True)

    run(PASS, program(forward), X).refuses("nothing is added to the variance")


def test_a_mean_that_others_read_is_refused() -> None:
    def forward(m, x):
        return (x - mean(x)) / torch.sqrt(variance(x) + EPS), mean(x).sin()

    run([PASS], program(forward), X).counts(layer_norm=1)  # they compute it themselves

    def shared(m, x):
        middle = mean(x)
        return (x - middle) / torch.sqrt(variance(x) + EPS), middle.sin()

    run(PASS, program(shared), X).refuses("mean is also read by sin")


def test_a_bias_of_more_bits_is_refused() -> None:
    def forward(m, x):
        return (F.layer_norm(x, (8,), eps=EPS) + m.b).float()

    run(PASS, program(forward, b=B.double()), X).refuses("the bias is torch.float64, not torch.float32")


def test_a_dynamic_size_is_refused() -> None:
    def forward(m, x):
        return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, False, keepdim=True) + EPS)

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.refuses("the size of what is normalised is dynamic")


def test_what_only_looks_like_it_stays() -> None:
    ran = run(PASS, program(each(OTHERS), w=W, b=B), X).stays()
    assert not ran.remarks.of_kind("missed")


def test_torchs_own_module_stays() -> None:
    def forward(m, x):
        return m.norm(x)

    run(PASS, program(forward, norm=nn.LayerNorm(8)), X).stays()


def test_dynamic_sizes() -> None:
    names = {"x": {0: "batch", 1: "seq"}}
    ran = run(PASS, program(SPELLINGS["var_mean and addcmul"], w=W, b=B), X, dynamic=names)
    ran.counts(layer_norm=1, var_mean=0).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))
