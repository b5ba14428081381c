from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.passes import fold_constants
from graphopt.passes.fuse_quantized_linear import PASS
from tests._models import generator, randn
from tests.passes._harness import program, run
from tests.passes._quantizer import INT8, UINT8, ops

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


def test_zero_points() -> None:
    def forward(m, x):
        each = F.linear(x, (m.w.float() - m.zero) * m.scale, m.b)
        return each, F.linear(x, 0.01 * (m.u.float() - 128), m.b)

    zero = torch.arange(6.0)[:, None]
    unsigned = (W8.int() + 128).to(torch.uint8)
    model = program(forward, w=W8, zero=zero, scale=SCALE, b=randn(6), u=unsigned)
    run(PASS, model, X, redraw=False).counts(quantized_linear=2, linear=0, sub=0)


def test_what_a_quantizer_writes() -> None:
    def forward(m, x):
        each = F.linear(x, ops.dequantize_per_channel(m.w, m.s, m.z, 0, *INT8), m.b)
        return each, F.linear(x, ops.dequantize_per_tensor(m.u, 0.02, 128, *UINT8))

    unsigned = (W8.int() + 128).to(torch.uint8)
    model = program(forward, w=W8, s=SCALE[:, 0].clone(), z=torch.arange(6), b=randn(6), u=unsigned)
    run([PASS, fold_constants.PASS], model, X, redraw=False).becomes("""
        %0 = graphopt.quantized_linear(x, w, <a scale a row: s>, b, <a zero point a row: z>)
        %1 = graphopt.quantized_linear(x, u, <a scale a row: >, None, <a zero point a row: >)
        return %0, %1
    """)


def test_a_float_weight_that_is_quantized_on_the_way() -> None:
    def forward(m, x):
        each = (m.s, m.z, 0, -127, 127)
        q = ops.quantize_per_channel(m.w, *each, torch.int8)
        a = F.linear(x, ops.dequantize_per_channel(q, *each, torch.int8), m.b)
        b = F.linear(x, torch.fake_quantize_per_channel_affine(m.w, *each))
        return a, b, F.linear(x, torch.fake_quantize_per_tensor_affine(m.w, 0.2, 3, -8, 7))

    model = program(
        forward, w=randn(6, 8), s=SCALE[:, 0] + 0.01, z=torch.zeros(6, dtype=torch.int32), b=randn(6)
    )
    ran = run(PASS, model, X, redraw=False)
    ran.counts(quantized_linear=3, linear=0, fake_quantize_per_channel_affine=0, quantize_per_channel=0)


def test_scales_of_the_columns_are_refused() -> None:
    def forward(m, x):
        return F.linear(x, ops.dequantize_per_channel(m.w, m.s, None, 1, *INT8))

    model = program(forward, w=W8, s=torch.rand(8))
    run(PASS, model, X, redraw=False).refuses("the scales are those of dimension 1 of 2, not one a row")


def test_codes_of_more_bits_are_refused() -> None:
    def forward(m, x):
        return F.linear(x, ops.dequantize_per_tensor(m.w, 0.01, 0, -512, 511, torch.int16))

    model = program(forward, w=W8.to(torch.int16))
    run(PASS, model, X).refuses("codes from -512 to 511 have more than 8 bits")


def test_a_weight_in_half_precision_is_refused() -> None:
    def forward(m, x):
        return F.linear(x, ops.dequantize_per_tensor(m.w, 0.01, 0, *INT8, out_dtype=torch.bfloat16))

    run(PASS, program(forward, w=W8), X.bfloat16()).refuses("the weight is dequantized to torch.bfloat16")


def test_a_computed_scale_is_refused() -> None:
    def forward(m, x, s):
        return F.linear(x, ops.dequantize_per_channel(m.w, s, None, 0, *INT8))

    run(PASS, program(forward, w=W8), X, SCALE[:, 0]).refuses("the scale or the zero point is not a constant")


def test_a_zero_point_that_is_no_code_is_refused() -> None:
    def forward(m, x):
        return F.linear(x, (m.w.float() - 0.5) * 0.01), F.linear(
            x, ops.dequantize_per_tensor(m.w, 0.01, 300, *INT8)
        )

    run(PASS, program(forward, w=W8), X).refuses("the zero point is no integer of 8 bits")


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
