from __future__ import annotations

import torch

from graphopt.passes.default import pipeline
from graphopt.passes.fuse_masked_mean_pool import PASS
from tests._models import minilm, padding, randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)
MASK = padding((5, 3), 5)


def sentence_transformers(m, x, mask):
    weights = mask.unsqueeze(-1).expand(x.size()).float()
    return torch.sum(x * weights, 1) / torch.clamp(weights.sum(1), min=1e-9)


def a_column(m, x, mask):
    weights = mask[..., None].to(x.dtype)
    return (weights * x).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-9)


def counted_apart(m, x, mask):
    return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def counted_apart_in_float(m, x, mask):
    weights = mask.float()
    return (x * weights.unsqueeze(2)).sum(1) / weights.sum(-1).unsqueeze(-1).clamp(min=1)


def counted_in_integers(m, x, mask):
    return (mask[:, :, None] * x).sum(1) / mask.sum(1).clamp(min=1)[:, None].to(x.dtype)


def test_as_in_sentence_transformers() -> None:
    run(PASS, program(sentence_transformers), X, MASK).becomes(
        before="""
            %0 = unsqueeze(mask, -1)
            %1 = expand(%0, [2, 5, 8])
            %2 = to(%1, float32)
            %3 = mul(x, %2)
            %4 = sum(%3, [1])
            %5 = sum(%2, [1])
            %6 = clamp(%5, 1e-09)
            %7 = div(%4, %6)
            return %7
        """,
        expected="""
            %0 = graphopt.masked_mean_pool(x, mask, 1e-09)
            return %0
        """,
    )


def test_other_spellings() -> None:
    for spelling in (a_column, counted_apart, counted_apart_in_float, counted_in_integers):
        ran = run(PASS, program(spelling), X, MASK)
        ran.counts(masked_mean_pool=1, sum=0, mul=0, div=0, unsqueeze=0)


def test_an_empty_sentence() -> None:
    run(PASS, program(a_column), X, padding((5, 0), 5)).counts(masked_mean_pool=1)


def test_another_mask_in_the_divisor_stays() -> None:
    def forward(m, x, mask, other):
        return (x * mask.unsqueeze(-1)).sum(1) / other.sum(1, keepdim=True)

    run(PASS, program(forward), X, MASK, 1 + MASK).stays()


def test_means_of_other_things_stay() -> None:
    def forward(m, x, mask):
        over_features = (x * mask.unsqueeze(-1)).sum(2) / mask.sum(1, keepdim=True)
        at_most = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(1, 4)
        return over_features, at_most, x.sum(1) / mask.sum(1, keepdim=True)

    run(PASS, program(forward), X, MASK).stays()


def test_a_sum_that_others_read_is_refused() -> None:
    def forward(m, x, mask):
        total = (x * mask.unsqueeze(-1)).sum(1)
        return total / mask.sum(1, keepdim=True), total

    run(PASS, program(forward), X, MASK).refuses("sum_1 is also read by output")


def test_one_mask_for_every_sentence_is_refused() -> None:
    def forward(m, x, mask):
        return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    run(PASS, program(forward), X, MASK[:1]).refuses(r"the mask has shape \[1, 5\], the tokens \[2, 5\]")


def test_a_wider_mean_is_refused() -> None:
    def forward(m, x, mask):
        return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    model = program(forward)
    run(PASS, model, X.bfloat16(), MASK.float()).refuses("the mean is torch.float32, of values that are")


def test_the_mask_may_be_read_by_others() -> None:
    def forward(m, x, mask):
        weights = mask.unsqueeze(-1).float()
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9), weights

    run(PASS, program(forward), X, MASK).counts(masked_mean_pool=1, sum=0, unsqueeze=1)


def test_a_sentence_embedder() -> None:
    example = minilm()
    run(pipeline(), example.model, kwargs=example.kwargs, redraw=False).counts(masked_mean_pool=1, sum=0)


def test_dynamic_sizes() -> None:
    dynamic = {name: {0: "batch", 1: "seq"} for name in ("x", "mask")}
    ran = run(PASS, program(sentence_transformers), X, MASK, dynamic=dynamic)
    ran.counts(masked_mean_pool=1, sum=0).agrees(randn(3, 2, 8), padding((2, 1, 2), 2))
