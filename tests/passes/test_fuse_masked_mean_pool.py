from __future__ import annotations

import pytest
import torch

from graphopt.passes.default import pipeline
from graphopt.passes.fuse_masked_mean_pool import PASS
from graphopt.passes.remove_noops import PASS as REMOVE_NOOPS
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


def product(m, x, mask):
    total = torch.bmm(mask.unsqueeze(1).float(), x).squeeze(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1e-9)


def product_of_a_cast(m, x, mask):
    weights = mask.to(x.dtype)
    return (weights[:, None] @ x)[:, 0] / weights.sum(1, keepdim=True)


def product_from_the_right(m, x, mask):
    weights = mask.unsqueeze(-1).float()
    return torch.matmul(x.transpose(1, 2), weights).squeeze(-1) / weights.sum(1).clamp(min=1)


def summed_by_letters(m, x, mask):
    total = torch.einsum("nt,ntd->nd", mask.float(), x)
    return total / mask.sum(-1).clamp(min=1)[:, None]


def summed_by_letters_turned(m, x, mask):
    return torch.einsum("bsh, bs -> bh", x, mask.float()) / mask.float().sum(1, keepdim=True)


PRODUCTS = [
    product,
    product_of_a_cast,
    product_from_the_right,
    summed_by_letters,
    summed_by_letters_turned,
]


@pytest.mark.parametrize("spelling", PRODUCTS)
def test_sums_that_are_products_of_matrices(spelling) -> None:
    dynamic = {name: {0: "batch", 1: "seq"} for name in ("x", "mask")}
    for given in (None, dynamic):
        ran = run([REMOVE_NOOPS, PASS], program(spelling), X, MASK, dynamic=given)
        ran.counts(masked_mean_pool=1, sum=0, div=0, bmm=0, matmul=0, einsum=0)
    ran.agrees(randn(3, 2, 8), padding((2, 1, 2), 2))


def test_products_over_other_dimensions_stay() -> None:
    def forward(m, x, mask):
        count = mask.sum(1, keepdim=True)
        features = torch.einsum("bdt,bt->bd", x, mask.float()) / count
        crossed = torch.einsum("bt,ctd->bd", mask.float(), x) / count
        return features, crossed, (mask.float().unsqueeze(1) @ x).squeeze(1) / (1 + count)

    run(PASS, program(forward), randn(2, 5, 5), MASK).stays()


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
