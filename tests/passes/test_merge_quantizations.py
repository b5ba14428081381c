from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.passes.default import pipeline
from graphopt.passes.merge_quantizations import PASS
from tests._models import generator, randn
from tests.passes._harness import program, run
from tests.passes._quantizer import INT8, UINT8, ops

X = randn(2, 5, 8)
CODES = torch.randint(-127, 128, (6, 8), dtype=torch.int8, generator=generator())
SCALES, POINTS = torch.rand(8, generator=generator()) / 50 + 0.01, torch.arange(8) - 3


CODING = (0.05, 3, *INT8)
Q, DQ = ops.quantize_per_tensor, ops.dequantize_per_tensor


def test_codes_come_back() -> None:
    def forward(m, x):
        return DQ(Q(DQ(Q(x, *CODING), *CODING), *CODING), *CODING)

    run(PASS, program(forward), X).becomes(
        before="""
            %0 = quantized_decomposed.quantize_per_tensor(x, 0.05, 3, -128, 127, int8)
            %1 = quantized_decomposed.dequantize_per_tensor(%0, 0.05, 3, -128, 127, int8)
            %2 = quantized_decomposed.quantize_per_tensor(%1, 0.05, 3, -128, 127, int8)
            %3 = quantized_decomposed.dequantize_per_tensor(%2, 0.05, 3, -128, 127, int8)
            return %3
        """,
        expected="""
            %0 = quantized_decomposed.quantize_per_tensor(x, 0.05, 3, -128, 127, int8)
            %1 = quantized_decomposed.dequantize_per_tensor(%0, 0.05, 3, -128, 127, int8)
            return %1
        """,
    )


def test_fake_quantization_twice_is_once() -> None:
    def forward(m, x):
        each = torch.fake_quantize_per_channel_affine
        y = each(x, m.s, m.z, 2, 0, 255)
        whole = torch.fake_quantize_per_tensor_affine
        return whole(whole(x, 0.05, 3, -8, 7), 0.05, 3, -8, 7), each(y, m.s, m.z, 2, 0, 255)

    model = program(forward, s=SCALES, z=POINTS.int() + 3)
    ran = run(PASS, model, X, redraw=False)
    ran.counts(fake_quantize_per_tensor_affine=1, fake_quantize_per_channel_affine=1)


def test_parameters_of_a_channel_and_in_tensors() -> None:
    def forward(m, x):
        each = (m.s, m.z, 2, *INT8)
        q = ops.quantize_per_channel(x, *each)
        p = Q.tensor(x, m.one, m.point, *UINT8)
        q = ops.quantize_per_channel(ops.dequantize_per_channel(q, *each), *each)
        return q, Q(DQ(p, 0.25, 7, *UINT8), 0.25, 7, *UINT8)

    model = program(forward, s=SCALES, z=POINTS, one=torch.tensor(0.25), point=torch.tensor(7))
    ran = run(PASS, model, X, redraw=False)
    ran.counts(quantize_per_channel=1, quantize_per_tensor=1, dequantize_per_channel=0)


def test_every_code_comes_back() -> None:
    def forward(m, q, x):
        return Q(DQ(q, 3e-7, 5, *INT8), 3e-7, 5, *INT8), x

    every = torch.arange(-128, 128, dtype=torch.int8)
    run(PASS, program(forward), every, X).counts(quantize_per_tensor=0)


def test_what_others_read_stays_for_them() -> None:
    def forward(m, x):
        y = DQ(Q(x, *CODING), *CODING)
        return Q(y, *CODING), y

    run(PASS, program(forward), X).counts(quantize_per_tensor=1, dequantize_per_tensor=1)


def test_another_axis_is_refused() -> None:
    def forward(m, x):
        q = ops.quantize_per_channel(x, m.s, m.z, 1, *INT8)
        y = ops.dequantize_per_channel(q, m.s, m.z, 1, *INT8)
        return ops.quantize_per_channel(y, m.s, m.z, -1, *INT8)

    model = program(forward, s=SCALES, z=POINTS)
    run(PASS, model, randn(2, 8, 8), redraw=False).refuses("the axis is another one")


@pytest.mark.parametrize(
    ("again", "name"),
    [
        ((0.06, 3, *INT8), "scale"),
        ((0.05, 4, *INT8), "zero_point"),
        ((0.05, 3, -127, 127, torch.int8), "low"),
    ],
)
def test_other_parameters_are_refused(again, name) -> None:
    def forward(m, x):
        return Q(DQ(Q(x, *CODING), *CODING), *again)

    run(PASS, program(forward), X).refuses(f"the {name} is another one")


def test_a_scale_that_is_computed_is_refused() -> None:
    def forward(m, x, scale):
        one = (scale, m.point, *INT8)
        return Q.tensor(DQ.tensor(Q.tensor(x, *one), *one), *one)

    model = program(forward, point=torch.tensor(3))
    run(PASS, model, X, torch.tensor(0.05)).refuses("a scale or a zero point is not a constant")


def test_values_in_half_precision_are_refused() -> None:
    def forward(m, x):
        return Q(DQ(Q(x, *CODING), *CODING, out_dtype=torch.bfloat16), *CODING)

    run(PASS, program(forward), X).refuses("the values in between are torch.bfloat16, which rounds")


def test_many_bits_are_refused() -> None:
    def forward(m, x):
        of = (0.05, 3, -(2**31), 2**31 - 1, torch.int32)
        return Q(DQ(Q(x, *of), *of), *of)

    run(PASS, program(forward), X).refuses("the codes have more than 16 bits")


def test_codes_of_another_type_are_refused() -> None:
    def forward(m, x):
        of = (0.05, 3, 0, 100)
        return Q(DQ(Q(x, *of, torch.uint8), *of, torch.uint8), *of, torch.int8)

    run(PASS, program(forward), X).refuses("the codes become torch.int8, and were torch.uint8")


def test_codes_out_of_range_are_refused() -> None:
    def forward(m, q, x):
        of = (0.05, 3, -127, 127, torch.int8)
        return Q(DQ(q, *of), *of), x

    run(PASS, program(forward), CODES, X).refuses("codes outside of -127 to 127 would be cut off")


def test_constant_codes_in_range() -> None:
    def forward(m, x):
        of = (0.05, 3, -127, 127, torch.int8)
        return Q(DQ(m.w, *of), *of), x

    run(PASS, program(forward, w=CODES), X).counts(quantize_per_tensor=0)


def test_a_quantized_block() -> None:
    def forward(m, x):
        each = (m.s, None, 0, -127, 127, torch.int8)
        y = DQ(Q(DQ(Q(x, *CODING), *CODING), *CODING), *CODING)
        y = F.linear(y, ops.dequantize_per_channel(m.w, *each), m.b)
        return DQ(Q(y, 0.1, 0, *INT8), 0.1, 0, *INT8)

    model = program(forward, w=CODES, s=SCALES[:6].clone(), b=randn(6))
    run(pipeline(), model, X, redraw=False).counts(
        quantize_per_tensor=2, dequantize_per_tensor=2, quantized_linear=1, dequantize_per_channel=0
    )


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return DQ(Q(DQ(Q(x, *CODING), *CODING), *CODING), *CODING)

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(quantize_per_tensor=1, dequantize_per_tensor=1).agrees(randn(3, 2, 8))
