from __future__ import annotations

import pytest
import torch

from graphopt.passes.fold_constants import PASS as FOLD_CONSTANTS
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
    "the result turned": lambda x, m: torch.einsum("bsd,dh->bhs", x, m.w),
    "heads first": lambda x, m: torch.einsum("bsd,dhk->bhsk", x, m.heads),
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
    "a weight for each position": ("bsd,sdh->bsh", (5, 8, 6)),
    "a sum over the weight alone": ("bsd,dhk->bsh", (8, 6, 3)),
    "dots in the weight": ("bsd,...d->bs", (1, 8)),
}


@pytest.mark.parametrize(("equation", "shape"), EINSUMS.values(), ids=EINSUMS)
def test_an_einsum_that_is_no_projection_is_refused(equation: str, shape: tuple[int, ...]) -> None:
    def forward(m, x):
        return torch.einsum(m.equation, x, m.w)

    model = program(forward, w=randn(*shape), equation=equation)
    ran = run(PASS, model, X)
    ran.refuses("the weight does not meet the last dimensions, or is another one for each row")


EXPERTS = {
    "an einsum": lambda x, m: torch.einsum("bsd,edi->bsei", x, m.w),
    "an einsum, experts first": lambda x, m: torch.einsum("bsd,edi->ebsi", x, m.w),
    "a matmul": lambda x, m: x.unsqueeze(1) @ m.w,
    "a matmul, experts first": lambda x, m: x[None] @ m.w[:, None],
    "a bmm": lambda x, m: torch.bmm(x.view(10, 8).unsqueeze(0).expand(3, -1, -1), m.w),
}


def test_experts_that_read_the_same_value() -> None:
    def forward(m, x):
        return [spelled(x, m) for spelled in EXPERTS.values()]

    ran = run([FOLD_CONSTANTS, PASS], program(forward, w=randn(3, 8, 6)), X)
    ran.counts(linear=len(EXPERTS) - 1, bmm=0, einsum=0)


def test_experts_of_a_repeated_value() -> None:
    def forward(m, x):
        return x.unsqueeze(1) @ m.w

    run(PASS, program(forward, w=randn(3, 8, 6)), X).becomes("""
        %0 = linear(x, <laid out: w>)
        %1 = reshape(%0, [2, 5, 3, 6])
        %2 = permute(%1, [0, 2, 1, 3])
        return %2
    """)


def test_experts_that_read_their_own_values_stay() -> None:
    def forward(m, x):
        return torch.bmm(x, m.w), x[:, None].sin() @ m.w[:, None], x[:1].expand(2, -1, -1) @ m.w

    run(PASS, program(forward, w=randn(2, 8, 6)), X).counts(bmm=1)


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
        return torch.einsum("bshk,hkd->bsd", heads, m.out) @ m.w, x.unsqueeze(1) @ m.experts

    model = program(forward, heads=randn(8, 2, 3), out=randn(2, 3, 8), w=randn(8, 6), experts=randn(3, 8, 6))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}}).counts(linear=4, einsum=0, matmul=0)
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 1, 8))
