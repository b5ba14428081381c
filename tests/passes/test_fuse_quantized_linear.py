from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.passes import fold_constants
from graphopt.passes.fuse_quantized_linear import PASS
from tests._models import generator, randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)
W8 = torch.randint(-127, 128, (6, 8), dtype=torch.int8, generator=generator())
SCALE = torch.rand(6, 1, generator=generator()) / 100


def test_a_scale_for_each_row() -> None:
    def forward(m, x):
        return F.linear(x, m.w.to(x.dtype) * m.scale, m.b)

    run(
        [PASS, fold_constants.PASS], program(forward, w=W8, scale=SCALE, b=randn(6)), X, redraw=False
    ).becomes(
        before="""
            %0 = to(w, float32)
            %1 = mul(%0, scale)
            %2 = linear(x, %1, b)
            return %2
        """,
        expected="""
            %0 = graphopt.quantized_linear(x, w, <a scale a row: scale>, b)
            return %0
        """,
    )


def test_one_scale_for_all() -> None:
    def forward(m, x):
        return F.linear(x, 0.01 * m.w.float())

    run(PASS, program(forward, w=W8), X).counts(quantized_linear=1, linear=0)


def test_a_wider_integer_is_refused() -> None:
    def forward(m, x):
        return F.linear(x, m.w.float() * m.scale)

    model = program(forward, w=W8.to(torch.int16), scale=SCALE)
    run(PASS, model, X, redraw=False).refuses("the weight is torch.int16 of 2 dimensions")


def test_a_scale_for_each_column_is_refused() -> None:
    def forward(m, x):
        return F.linear(x, m.w.float() * m.scale)

    model = program(forward, w=W8, scale=torch.rand(8))
    run(PASS, model, X, redraw=False).refuses(r"the scale has shape \[8\], not one value a row")


def test_a_scale_that_is_an_input_is_refused() -> None:
    def forward(m, x, scale):
        return F.linear(x, m.w.float() * scale)

    run(PASS, program(forward, w=W8), X, SCALE).refuses("the scale is not a constant")


def test_a_scale_of_another_type_is_refused() -> None:
    def forward(m, x):
        return F.linear(x, m.w.to(torch.bfloat16) * m.scale)

    model = program(forward, w=W8, scale=torch.tensor(0.01))
    run(PASS, model, X.bfloat16(), redraw=False).refuses("the scale is torch.float32, the product torch.bf")


def test_a_weight_that_others_read_is_refused() -> None:
    def forward(m, x):
        weight = m.w.float() * m.scale
        return F.linear(x, weight), weight

    run(PASS, program(forward, w=W8, scale=SCALE), X, redraw=False).refuses("mul is also read by output")


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return F.linear(x, m.w.float() * m.scale)

    model = program(forward, w=W8, scale=SCALE)
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}}, redraw=False)
    ran.counts(quantized_linear=1).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))
