from __future__ import annotations

import pytest
import torch

from graphopt.passes.fold_weight_layout import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


def test_a_product_with_a_weight() -> None:
    def forward(m, x):
        return x @ m.w

    ran = run(PASS, program(forward, w=randn(8, 6)), X)
    ran.becomes(
        before="""
            %0 = matmul(x, w)
            return %0
        """,
        expected="""
            %0 = linear(x, <transposed: w>)
            return %0
        """,
    )
    (folded,) = (c.tensor for c in ran.graph.constants.values() if c.how)
    own = dict(ran.model.named_parameters())["w"]
    assert folded.data_ptr() == own.data_ptr()  # a view, no copy


SPELLINGS = {
    "of matrices": lambda x, m: torch.mm(x[0], m.w),
    "of a vector": lambda x, m: x[0, 0] @ m.w,
    "as an einsum": lambda x, m: torch.einsum("bsd,dh->bsh", x, m.w),
    "as an einsum of rows": lambda x, m: torch.einsum("bsd, hd -> bsh", x, m.rows),
    "weight first": lambda x, m: torch.einsum("hd,bsd->bsh", m.rows, x),
    "of any rank": lambda x, m: torch.einsum("...d,dh->...h", x, m.w),
    "into heads": lambda x, m: torch.einsum("bsd,dhk->bshk", x, m.heads),
    "out of heads": lambda x, m: torch.einsum("bshk,hkd->bsd", x.view(2, 5, 2, 4), m.out),
    "heads, mixed": lambda x, m: torch.einsum("bshk,dkh->bsd", x.view(2, 5, 2, 4), m.mixed),
}


def test_every_spelling() -> None:
    """All in one program, since capturing takes the time."""

    def forward(m, x):
        return [spelled(x, m) for spelled in SPELLINGS.values()]

    weights = {"w": randn(8, 6), "rows": randn(6, 8), "heads": randn(8, 2, 3)}
    weights |= {"out": randn(2, 4, 7), "mixed": randn(7, 4, 2)}
    ran = run(PASS, program(forward, **weights), X)
    ran.counts(linear=len(SPELLINGS), matmul=0, mm=0, einsum=0)


EINSUMS = {
    "another dimension": ("bsd,sh->bdh", (5, 6)),
    "a batch of weights": ("bsd,bdh->bsh", (2, 8, 6)),
    "the result turned": ("bsd,dh->bhs", (8, 6)),
    "a sum over the weight alone": ("bsd,dhk->bsh", (8, 6, 3)),
    "dots in the weight": ("bsd,...d->bs", (1, 8)),
}


@pytest.mark.parametrize(("equation", "shape"), EINSUMS.values(), ids=EINSUMS)
def test_an_einsum_that_is_no_projection_is_refused(equation: str, shape: tuple[int, ...]) -> None:
    def forward(m, x):
        return torch.einsum(m.equation, x, m.w)

    model = program(forward, w=randn(*shape), equation=equation)
    ran = run(PASS, model, X)
    ran.refuses("the weight does not meet the last dimensions and make the last ones of the result")


def test_whole_numbers_are_refused() -> None:
    def forward(m, x):
        return x @ m.w

    model = program(forward, w=torch.arange(48).reshape(8, 6))
    run(PASS, model, X.long()).refuses("a torch.int64 weight multiplies torch.int64")


def test_others_stay() -> None:
    def forward(m, x):
        outer = torch.einsum("s,d->sd", x[0, :, 0], m.row)
        return x @ x.transpose(1, 2), m.square @ x, x @ m.batch, x @ m.row, outer

    weights = {"square": randn(5, 5), "batch": randn(2, 8, 3), "row": randn(8)}
    run(PASS, program(forward, **weights), X).stays()


def test_half_precision() -> None:
    def forward(m, x):
        return x @ m.w

    run(PASS, program(forward, w=randn(8, 6).bfloat16()), X.bfloat16()).counts(linear=1)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        heads = torch.einsum("bsd,dhk->bshk", x, m.heads)
        return torch.einsum("bshk,hkd->bsd", heads, m.out) @ m.w

    model = program(forward, heads=randn(8, 2, 3), out=randn(2, 3, 8), w=randn(8, 6))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}}).counts(linear=3, einsum=0)
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 1, 8))
