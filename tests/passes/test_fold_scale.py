from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_constants import PASS as FOLD_CONSTANTS
from graphopt.passes.fold_scale import PASS
from tests._models import randn, tokens
from tests.passes._harness import program, run

X = randn(2, 5, 8)
IMAGE = randn(2, 3, 9, 9)


def test_behind_a_projection() -> None:
    def forward(m, x):
        return m.linear(x) * 0.125

    of = "linear.weight, linear.bias"
    run(PASS, program(forward, linear=nn.Linear(8, 6)), X).becomes(
        before=f"""
            %0 = linear(x, {of})
            %1 = mul(%0, 0.125)
            return %1
        """,
        expected=f"""
            %0 = linear(x, <scale folded: {of}>, <scale folded: {of}>)
            return %0
        """,
    )


def test_normalised_images() -> None:
    def forward(m, x):
        return m.conv((x - m.mean) / m.std)

    layers = {"conv": nn.Conv2d(3, 6, 4, stride=2), "mean": randn(3, 1, 1), "std": randn(3, 1, 1, seed=1)}
    of = "conv.weight, conv.bias, std"
    run(PASS, program(forward, **layers), IMAGE).becomes(
        before="""
            %0 = sub(x, mean)
            %1 = div(%0, std)
            %2 = conv2d(%1, conv.weight, conv.bias, [2, 2])
            return %2
        """,
        expected=f"""
            %0 = conv2d(x, <scale folded: {of}, mean>, <scale folded: {of}, mean>, [2, 2])
            return %0
        """,
    )


SPELLINGS = {
    "divided": lambda y, m: y / 3,
    "divided by a vector": lambda y, m: y / m.c,
    "literal first": lambda y, m: 2 * y,
    "vector first": lambda y, m: m.c * y,
    "negated": lambda y, m: -y,
    "shifted": lambda y, m: y + m.c,
    "shifted, vector first": lambda y, m: m.c + y,
    "shifted by a multiple": lambda y, m: torch.add(y, m.c, alpha=3),
    "a multiple of it added": lambda y, m: torch.add(m.c, y, alpha=3),
    "subtracted": lambda y, m: y - m.c,
    "a multiple subtracted": lambda y, m: torch.sub(y, m.c, alpha=0.5),
    "subtracted from": lambda y, m: m.c - y,
    "subtracted from a literal": lambda y, m: 1 - y,
    "a multiple of it subtracted": lambda y, m: torch.sub(m.c, y, alpha=2),
    "reversed": lambda y, m: torch.rsub(y, m.c, alpha=2),
    "expanded": lambda y, m: y * m.c.expand(5, 8),
    "several": lambda y, m: (y * m.c + 1) / m.c - m.c,
    "layer scale": lambda y, m: m.c[None, None] * y,
}


@pytest.mark.parametrize("front", [False, True], ids=["behind", "in front"])
def test_every_spelling(front: bool) -> None:
    """All in one program, since capturing takes the time."""
    changes = list(SPELLINGS.values())

    def forward(m, x):
        if front:
            return [linear(change(x, m)) for linear, change in zip(m.linears, changes, strict=True)]
        return [change(linear(x), m) for linear, change in zip(m.linears, changes, strict=True)]

    linears = nn.ModuleList(nn.Linear(8, 8, bias=index % 2 == 0) for index in range(len(changes)))
    model = program(forward, linears=linears, c=torch.rand(8) + 0.5)
    ran = run([FOLD_CONSTANTS, PASS], model, X)
    ran.counts(linear=len(changes), add=0, sub=0, rsub=0, mul=0, div=0, neg=0)


def test_queries_scaled_by_head() -> None:
    def forward(m, x):
        q = m.q(x).view(2, 5, 2, 4).transpose(1, 2) * 0.5
        k = m.k(x).view(2, 5, 2, 4) * m.head
        return q @ (k.permute(0, 2, 3, 1) / m.feature)

    weights = {"head": randn(2, 1), "feature": torch.rand(2, 4, 1) + 0.5}
    ran = run(PASS, program(forward, q=nn.Linear(8, 8), k=nn.Linear(8, 8, bias=False), **weights), X)
    ran.counts(linear=2, mul=0, div=0, reshape=2, transpose=1, permute=1)


def test_channels_last_images() -> None:
    def forward(m, x):
        return m.conv(((x - 0.5) / m.std).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2) * m.scale

    layers = {"conv": nn.Conv2d(3, 6, 4, stride=4), "std": torch.rand(3) + 0.5, "scale": randn(6)}
    ran = run(PASS, program(forward, **layers), randn(2, 8, 8, 3))
    ran.counts(conv2d=1, sub=0, div=0, mul=0)


def test_pixels_flattened_for_a_projection() -> None:
    def forward(m, x):
        return m.linear(((x - m.mean) * m.scale).flatten(1))

    layers = {"linear": nn.Linear(3 * 9 * 9, 5), "mean": randn(3, 1, 1), "scale": randn(1, 3, 1, 1)}
    run(PASS, program(forward, **layers), IMAGE).counts(linear=1, sub=0, mul=0)


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
}


def test_every_convolution() -> None:
    def forward(m, x):
        return [conv(x * m.before) * m.after for conv in m.convs]

    convs = nn.ModuleList(CONVOLUTIONS.values())
    ran = run(
        PASS, program(forward, convs=convs, before=randn(4, 1, 1), after=randn(6, 1, 1)), randn(2, 4, 7, 7)
    )
    ran.counts(mul=0, conv2d=3, conv_transpose2d=1)


def test_an_image_without_batch() -> None:
    def forward(m, x):
        return m.conv(x / m.std)

    run(PASS, program(forward, conv=nn.Conv2d(3, 4, 3), std=randn(3, 1, 1)), randn(3, 7, 7)).counts(div=0)


def test_one_scale_in_front_of_three_projections() -> None:
    def forward(m, x):
        y = x * m.gamma
        return m.q(y), m.k(y), m.v(y)

    layers = {name: nn.Linear(8, 8) for name in "qkv"}
    run(PASS, program(forward, gamma=randn(8), **layers), X).counts(mul=0, linear=3)


def test_a_head_that_shares_the_table_is_refused() -> None:
    def forward(m, ids):
        return F.linear(m.table(ids).sin(), m.table.weight) * 2

    ran = run(PASS, program(forward, table=nn.Embedding(53, 8)), tokens(2, 5))
    ran.refuses("the weight is also read by embedding: it would be held twice")


def test_a_border_of_zeros_is_refused() -> None:
    def forward(m, x):
        return m.conv((x - m.mean) / 2)

    ran = run(PASS, program(forward, conv=nn.Conv2d(3, 6, 3, padding=1), mean=randn(3, 1, 1)), IMAGE)
    row = next(row for row in ran.remarks.of_kind("missed"))
    assert row.reason == "the convolution pads with zeros, which do not become the constant that is added"
    ran.counts(sub=1, div=0)


def test_a_second_reader_is_refused() -> None:
    def forward(m, x):
        y = m.linear(x)
        return y * 2, y.sin()

    ran = run(PASS, program(forward, linear=nn.Linear(8, 6)), X)
    ran.refuses("linear is also read by sin")


def test_a_second_reader_of_a_convolution_is_refused() -> None:
    def forward(m, x):
        y = m.conv(x)
        return y * 2, y.sin()

    ran = run(PASS, program(forward, conv=nn.Conv2d(3, 6, 3)), IMAGE)
    ran.refuses("the convolution's result is also read by sin")


def test_a_constant_that_differs_by_position_is_refused() -> None:
    def forward(m, x):
        return m.linear(x) + m.positions

    ran = run(PASS, program(forward, linear=nn.Linear(8, 6), positions=randn(5, 6)), X)
    ran.refuses("the constant differs along dimension 1, not only by channel")


def test_weights_that_are_inputs_are_refused() -> None:
    def forward(m, x, w, b):
        return F.linear(x, w) * 2, F.linear(x, m.w, b) * 2

    ran = run(PASS, program(forward, w=randn(6, 8)), X, randn(6, 8), randn(6))
    ran.refuses("^w is not a constant").refuses("^b is not a constant")


def test_weights_that_leave_their_type_are_refused() -> None:
    def forward(m, x):
        return m.one(x * 1e-3) * 3e5 * 1e-3, m.two(x) * 1e-7 * 1e4

    model = program(forward, one=nn.Linear(8, 6), two=nn.Linear(8, 6)).half()
    ran = run(PASS, model, X.half())
    reasons = {row.reason for row in ran.remarks.of_kind("missed")}
    assert "the new weights would underflow torch.float16" in reasons


def test_overflow_is_refused() -> None:
    def forward(m, x):
        return m.linear(x) * 6e4

    model = program(forward, linear=nn.Linear(8, 6)).half()
    model.linear.weight.data *= 10
    run(PASS, model, 1e-3 * X.half(), redraw=False).refuses("the new weights would overflow torch.float16")


def test_a_reshape_of_varying_sizes_is_refused() -> None:
    def forward(m, x):
        return m.linear(x).reshape(-1, 3) * m.c

    ran = run(PASS, program(forward, linear=nn.Linear(8, 6), c=randn(3)), X, dynamic={"x": {0: "batch"}})
    ran.refuses("the constant cannot be moved through view, whose sizes vary")


def test_what_is_no_constant_stays() -> None:
    def forward(m, x):
        y = m.linear(x)
        return (
            y * x,
            m.linear(x.sin()).to(torch.float64) * 2,
            torch.div(m.linear(x), 2, rounding_mode="floor"),
        )

    run(PASS, program(forward, linear=nn.Linear(8, 8)), X).stays()


def test_a_product_that_broadcasts_stays() -> None:
    def forward(m, x):
        return m.linear(x) * m.c

    run(PASS, program(forward, linear=nn.Linear(8, 6), c=randn(4, 1, 1, 6)), X).stays()


def test_half_precision() -> None:
    def forward(m, x):
        return m.linear(x) * m.c / 3

    run(PASS, program(forward, linear=nn.Linear(8, 6), c=randn(6)).bfloat16(), X.bfloat16()).counts(
        mul=0, div=0
    )


def test_dynamic_sizes() -> None:
    def forward(m, x):
        batch, seq, _ = x.shape
        q = m.linear(x / m.c).view(batch, seq, 2, 4).transpose(1, 2) * m.head
        return q.transpose(1, 2).reshape(batch, seq, 8) * 3

    model = program(forward, linear=nn.Linear(8, 8), c=torch.rand(8) + 0.5, head=randn(2, 1, 1))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}}).counts(mul=0, div=0)
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 1, 8))
