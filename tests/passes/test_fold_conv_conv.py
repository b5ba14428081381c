from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_conv_conv import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 3, 9, 9)


def two(m, x):
    return m.two(m.one(x))


def each(pairs):
    """A program that computes second(first(x)) for each: several in one, since capturing takes the time."""

    def forward(m, x):
        return [second(first(x)) for first, second in zip(m.first, m.second, strict=True)]

    first, second = zip(*pairs, strict=True)
    return program(forward, first=nn.ModuleList(first), second=nn.ModuleList(second))


def test_a_convolution_and_one_over_pixels() -> None:
    of = "one.weight, one.bias, two.weight, two.bias"
    run(PASS, program(two, one=nn.Conv2d(3, 8, 3, stride=2, padding=1), two=nn.Conv2d(8, 4, 1)), X).becomes(
        before="""
            %0 = conv2d(x, one.weight, one.bias, [2, 2], [1, 1])
            %1 = conv2d(%0, two.weight, two.bias)
            return %1
        """,
        expected=f"""
            %0 = conv2d(x, <multiplied: {of}>, <multiplied: {of}>, [2, 2], [1, 1])
            return %0
        """,
    )


PAIRS = {
    "pixels first": (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)),
    "pixels first, padded, no bias": (nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1)),
    "both over pixels": (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, bias=False)),
    "both strided": (nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 9, 1, stride=2)),
    "second strided": (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, stride=2, dilation=2)),
    "same size": (nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 4, 1, bias=False)),
    "uneven filters": (nn.Conv2d(3, 8, (3, 2), padding=(1, 0)), nn.Conv2d(8, 4, 1, padding="same")),
}


def test_every_pair() -> None:
    run(PASS, each(PAIRS.values()), X).counts(conv2d=len(PAIRS))


def test_one_dimension_and_three() -> None:
    def forward(m, x, y):
        return m.b(m.a(x)), m.d(m.c(y))

    layers = {"a": nn.Conv1d(4, 6, 3, padding=1), "b": nn.Conv1d(6, 4, 1)}
    layers |= {"c": nn.Conv3d(4, 6, 1), "d": nn.Conv3d(6, 4, 2)}
    ran = run(PASS, program(forward, **layers), randn(2, 4, 9), randn(2, 4, 3, 3, 3))
    ran.counts(conv1d=1, conv3d=1)


def test_a_narrow_hidden_image_is_refused() -> None:
    ran = run(PASS, program(two, one=nn.Conv2d(3, 1, 1), two=nn.Conv2d(1, 8, 1)), X)
    ran.refuses("one convolution takes 48 FLOPs a pixel, the two take 22")


def test_a_bias_that_is_padded_with_zeros_is_refused() -> None:
    ran = run(PASS, each([(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1))]), X)
    ran.refuses("the second convolution pads with zeros, which the first one's bias is not")
    ran = run(PASS, each([(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1, padding=1))]), X)
    ran.refuses("the second convolution pads with zeros, which the first one's bias is not")


def test_pixels_left_out_first_are_refused() -> None:
    ran = run(PASS, each([(nn.Conv2d(3, 8, 1, stride=2), nn.Conv2d(8, 4, 3))]), X)
    ran.refuses("the first convolution leaves out pixels or adds some")


def test_same_size_then_a_stride_is_refused() -> None:
    ran = run(PASS, each([(nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 4, 1, stride=2))]), X)
    ran.refuses("the first convolution keeps its size, which takes no stride")


def test_a_hidden_image_that_is_read_is_refused() -> None:
    def forward(m, x):
        y = m.one(x)
        return m.two(y), y

    run(PASS, program(forward, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 4, 1)), X).refuses(
        "conv2d is also read by output"
    )


def test_weights_that_are_inputs_are_refused() -> None:
    def forward(m, x, w, b):
        return F.conv2d(m.one(x), w), F.conv2d(m.one(x), m.two.weight, b)

    model = program(forward, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 4, 1))
    ran = run(PASS, model, X, randn(4, 8, 1, 1), randn(4))
    ran.refuses("^w is not a constant").refuses("^b is not a constant")


def test_weights_that_overflow_are_refused() -> None:
    model = program(two, one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(8, 4, 1)).half()
    model.one.weight.data[:] = 300.0
    model.two.weight.data[:] = 300.0
    run(PASS, model, 1e-5 * X.half(), redraw=False).refuses("the new weights would overflow torch.float16")


def test_others_stay() -> None:
    pairs = [
        (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)),
        (nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 4, 1)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 4, 1)),
    ]
    run(PASS, each(pairs), X).stays()


def test_dynamic_sizes() -> None:
    model = program(two, one=nn.Conv2d(3, 8, 3, padding=1), two=nn.Conv2d(8, 4, 1))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 2: "height"}}).counts(conv2d=1)
    ran.agrees(randn(3, 3, 5, 9)).agrees(randn(1, 3, 12, 9))
