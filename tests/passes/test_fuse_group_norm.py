from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.passes.fuse_group_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 8, 4, 6)
W, B = randn(8), randn(8, seed=1)
DYNAMIC = {"x": {0: "batch", 2: "height", 3: "width"}}


def of_groups(m, x):
    y = x.view(x.shape[0], 2, -1)
    mean, var = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
    y = ((y - mean) / torch.sqrt(var + 1e-5)).view(x.shape)
    return y * m.w.view(1, -1, 1, 1) + m.b.view(1, -1, 1, 1)


def in_five_dimensions(m, x):
    b, c, h, w = x.shape
    y = x.reshape(b, 2, c // 2, h, w)
    var, mean = torch.var_mean(y, (2, 3, 4), correction=0, keepdim=True)
    y = (torch.rsqrt(var + 1e-6) * (y - mean)).reshape(b, c, h, w)
    return m.b[:, None, None] + m.w[:, None, None] * y


def affine_of_the_groups(m, x):
    b, c, h, w = x.shape
    y = x.reshape(b, 2, c // 2, h, w)
    y = y - y.mean((2, 3, 4), keepdim=True)
    y = y * (y.square().mean((2, 3, 4), keepdim=True) + 1e-5).pow(-0.5)
    y = torch.addcmul(m.b.view(2, 4, 1, 1), y, m.w.view(2, 4, 1, 1))
    return y.reshape(b, c, h, w)


def a_row_a_group(m, x):
    y = x.reshape(x.shape[0] * 4, -1)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    return y.view_as(x) * m.w[:, None, None] + m.b[:, None, None]


def torchs_layer_norm(m, x):
    y = F.layer_norm(x.flatten(1).view(x.shape[0], 2, -1), (96,)).view_as(x)
    return y * m.w[:, None, None] + m.b[:, None, None]


def torchs_instance_norm(m, x):
    y = F.instance_norm(x.reshape(x.shape[0], 2, -1), eps=1e-4).view_as(x)
    return y * m.w[:, None, None] + m.b[:, None, None]


SPELLINGS = [of_groups, in_five_dimensions, affine_of_the_groups, a_row_a_group]


def test_a_norm_of_groups() -> None:
    run(PASS, program(of_groups, w=W, b=B), X).becomes(
        before="""
            %0 = reshape(x, [2, 2, 96])
            %1 = mean(%0, [-1], True)
            %2 = var(%0, [-1], False, True)
            %3 = sub(%0, %1)
            %4 = add(%2, 1e-05)
            %5 = sqrt(%4)
            %6 = div(%3, %5)
            %7 = reshape(%6, [2, 8, 4, 6])
            %8 = reshape(w, [1, 8, 1, 1])
            %9 = mul(%7, %8)
            %10 = reshape(b, [1, 8, 1, 1])
            %11 = add(%9, %10)
            return %11
        """,
        expected="""
            %0 = group_norm(x, 2, w, b, 1e-05)
            return %0
        """,
    )


@pytest.mark.parametrize("spelling", [*SPELLINGS, torchs_layer_norm, torchs_instance_norm])
def test_other_spellings(spelling) -> None:
    ran = run(PASS, program(spelling, w=W, b=B), X)
    ran.counts(group_norm=1, mul=0, add=0, reshape=0, layer_norm=0, instance_norm=0, addcmul=0)


def test_a_weight_in_the_shape_of_an_image() -> None:
    def forward(m, x):
        y = F.layer_norm(x.view(2, 4, -1), (48,)).view_as(x)
        return m.w * y

    run(PASS, program(forward, w=W.view(1, 8, 1, 1)), X).becomes("""
        %0 = reshape(w, [8])
        %1 = group_norm(x, 4, %0, None, 1e-05)
        return %1
    """)


def test_a_sequence_and_a_vector() -> None:
    def forward(m, x, y):
        a = F.layer_norm(x.view(2, 2, -1), (20,)).view_as(x) * m.w[:, None] + m.b[:, None]
        return a, F.layer_norm(y.view(3, 4, 2), (2,)).view_as(y) * m.w + m.b

    ran = run(PASS, program(forward, w=W, b=B), randn(2, 8, 5), randn(3, 8))
    ran.counts(group_norm=2, layer_norm=0)


def test_half_precision_in_float32() -> None:
    def forward(m, x):
        y = x.view(2, 2, -1).float()
        y = (y - y.mean(-1, keepdim=True)) * (y.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
        return y.to(x.dtype).view_as(x) * m.w[:, None, None] + m.b[:, None, None]

    model = program(forward, w=W, b=B).bfloat16()
    run(PASS, model, X.bfloat16()).counts(group_norm=1, to=0)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_dynamic_sizes(spelling) -> None:
    ran = run(PASS, program(spelling, w=W, b=B), X, dynamic=DYNAMIC)
    ran.counts(group_norm=1, mul=0).agrees(randn(3, 8, 5, 3))


def test_without_an_affine_it_stays_a_layer_norm_unless_sizes_vary() -> None:
    def forward(m, x):
        y = x.view(x.shape[0], 2, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y.view(x.shape)

    run(PASS, program(forward), X).stays()
    run(PASS, program(forward), X, dynamic=DYNAMIC).counts(group_norm=1, var=0).agrees(randn(3, 8, 5, 3))


def test_norms_of_other_things_stay() -> None:
    def forward(m, x):
        heads = F.layer_norm(x.view(2, 8, 4, 2, 3), (3,)).view_as(x) * m.w[:, None, None]
        rows = F.layer_norm(x.view(2, 2, -1), (96,)).view_as(x) * m.row
        grouped = F.layer_norm(x.view(2, 2, -1), (96,)) * m.element
        return heads, rows, grouped.view_as(x), F.layer_norm(x, (6,)) * m.w[:, None, None]

    run(PASS, program(forward, w=W, row=randn(6), element=randn(2, 1)), X).stays()


def test_another_place_of_the_channels_stays() -> None:
    def forward(m, x):
        return F.layer_norm(x.view(2, 2, -1), (64,)).view_as(x) * m.w

    run(PASS, program(forward, w=W), randn(2, 8, 2, 8)).stays()


def test_a_norm_that_others_read_is_refused() -> None:
    def forward(m, x):
        y = F.layer_norm(x.view(2, 2, -1), (96,)).view_as(x) * m.w[:, None, None]
        return y + m.b[:, None, None], y

    run(PASS, program(forward, w=W, b=B), X).counts(group_norm=1, add=1)

    def spelled(m, x):
        y = x.view(2, 2, -1)
        centred = y - y.mean(-1, keepdim=True)
        normed = centred / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return normed.view_as(x) * m.w[:, None, None], centred

    run(PASS, program(spelled, w=W), X).refuses("sub is also read by output")


def test_statistics_that_were_recorded_are_refused() -> None:
    def forward(m, x):
        y = F.instance_norm(x.view(2, 2, -1), m.mean, m.var, use_input_stats=False).view_as(x)
        return y * m.w[:, None, None]

    model = program(forward, w=W, mean=randn(2), var=torch.rand(2) + 0.5)
    run(PASS, model, X).refuses("the statistics are not the input's")


def test_a_factor_is_refused() -> None:
    def forward(m, x):
        y = x.view(2, 2, -1)
        y = 3 * (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y.view_as(x) * m.w[:, None, None]

    run(PASS, program(forward, w=W), X).refuses("the norm is multiplied by 3")


def test_a_weight_of_another_type_is_refused() -> None:
    def forward(m, x):
        return F.layer_norm(x.view(2, 2, -1), (96,)).view_as(x) * m.w[:, None, None]

    model = program(forward, w=W.bfloat16())
    run(PASS, model, X).refuses("the weight is torch.bfloat16, the tensor torch.float32")


def test_a_wider_norm_is_refused() -> None:
    def forward(m, x):
        y = x.view(2, 2, -1).float()
        y = (y - y.mean(-1, keepdim=True)) * (y.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
        return y.view_as(x) * m.w[:, None, None]

    model = program(forward, w=W.bfloat16())
    run(PASS, model, X.bfloat16()).refuses("the norm is torch.float32, of values that are torch.bfloat16")
