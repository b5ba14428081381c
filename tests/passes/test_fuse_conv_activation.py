from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.default import pipeline
from graphopt.passes.fuse_conv_activation import PASS
from tests._models import cnn, randn
from tests.passes._harness import program, run

X = randn(2, 6, 9, 9)


def test_a_convolution_with_its_activation() -> None:
    def forward(m, x):
        return torch.relu(m.conv(x))

    ran = run(PASS, program(forward, conv=nn.Conv2d(6, 8, 3, 2, padding=1)), X)
    ran.becomes(
        before="""
            %0 = conv2d(x, conv.weight, conv.bias, [2, 2], [1, 1])
            %1 = relu(%0)
            return %1
        """,
        expected="""
            %0 = graphopt.conv_activation(x, conv.weight, conv.bias, [2, 2], [1, 1], [1, 1], 1, relu, 1, None)
            return %0
        """,
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_a_shortcut_before_the_activation(swapped: bool) -> None:
    def forward(m, x):
        y = m.conv(x)
        return torch.relu(x + y if swapped else y + x)

    run(PASS, program(forward, conv=nn.Conv2d(6, 6, 3, padding=1)), X).becomes("""
        %0 = graphopt.conv_activation(x, conv.weight, conv.bias, [1, 1], [1, 1], [1, 1], 1, relu, 1, x)
        return %0
    """)


def test_two_convolutions_that_are_added() -> None:
    def forward(m, x):
        return torch.relu(m.one(x) + m.two(x))

    layers = {"one": nn.Conv2d(6, 8, 3, padding=1), "two": nn.Conv2d(6, 8, 1, bias=False)}
    run(PASS, program(forward, **layers), X).becomes("""
        %0 = conv2d(x, one.weight, one.bias, [1, 1], [1, 1])
        %1 = graphopt.conv_activation(x, two.weight, None, [1, 1], [0, 0], [1, 1], 1, relu, 1, %0)
        return %1
    """)


def test_depthwise_grouped_dilated_and_other_ranks() -> None:
    def forward(m, x):
        flat, cube = x[..., 0], x[:, :, None]
        return F.silu(m.depthwise(x)), F.hardswish(m.flat(flat)), F.gelu(m.cube(cube))

    layers = {
        "depthwise": nn.Conv2d(6, 6, 3, groups=6, dilation=2),
        "flat": nn.Conv1d(6, 4, 3, padding="same"),
        "cube": nn.Conv3d(6, 4, (1, 3, 3), padding="valid"),
    }
    run(PASS, program(forward, **layers), X).counts(conv_activation=3, conv1d=0, conv2d=0, conv3d=0)


def test_a_result_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        y = m.conv(x)
        return F.silu(y), y

    run(PASS, program(forward, conv=nn.Conv2d(6, 6, 1)), X).refuses("conv2d is also read by output")


def test_a_sum_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        y = m.conv(x) + x
        return torch.relu(y), y

    run(PASS, program(forward, conv=nn.Conv2d(6, 6, 1)), X).refuses("add is also read by output")


def test_lopsided_padding_is_refused() -> None:
    def forward(m, x):
        return torch.relu(m.conv(x))

    model = program(forward, conv=nn.Conv2d(6, 6, 2, padding="same"))
    run(PASS, model, X).refuses("the padding differs between the two sides")


def test_an_image_without_a_batch_is_refused() -> None:
    def forward(m, x):
        return torch.relu(m.conv(x))

    run(PASS, program(forward, conv=nn.Conv2d(6, 6, 1)), X[0]).refuses("no batch dimension")


def test_a_broadcast_sum_stays() -> None:
    def forward(m, x):
        return torch.relu(m.conv(x) + x.mean((2, 3), keepdim=True))

    run(PASS, program(forward, conv=nn.Conv2d(6, 6, 1)), X).stays()


def test_a_residual_network() -> None:
    example = cnn()
    ran = run(pipeline(), example.model, *example.args, redraw=False)
    ran.counts(conv_activation=5, conv2d=1, relu=0, batch_norm=0, add=0)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return torch.relu(m.conv(x) + x)

    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    ran = run(PASS, program(forward, conv=nn.Conv2d(6, 6, 3, padding=1)), X, dynamic=dynamic)
    ran.counts(conv_activation=1, add=0).agrees(randn(1, 6, 4, 5)).agrees(randn(3, 6, 7, 3))
