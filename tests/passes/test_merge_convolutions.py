from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.default import pipeline
from graphopt.passes.merge_convolutions import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 6, 9, 7)


def branches(m, x):
    return torch.cat([m.a(x).relu(), m.b(x), F.max_pool2d(m.c(x), 1)], 1)


def layers(**given: nn.Module) -> dict[str, nn.Module]:
    return {**{name: nn.Conv2d(6, size, 1) for name, size in (("a", 4), ("b", 3), ("c", 5))}, **given}


def test_branches_that_read_one_value() -> None:
    def forward(m, x):
        return m.a(x).relu(), m.b(x)

    run(PASS, program(forward, **layers()), X).becomes("""
        %0 = conv2d(x, <stacked: a.weight, b.weight>, <stacked: a.bias, b.bias>, [1, 1], [0, 0], [1, 1], 1)
        %1 = split_with_sizes(%0, [4, 3], 1)
        %2 = getitem(%1, 0)
        %3 = getitem(%1, 1)
        %4 = relu(%2)
        return %4, %3
    """)


def test_only_those_of_one_geometry() -> None:
    wide = nn.Conv2d(6, 5, 3, padding=1)
    ran = run(PASS, program(branches, **layers(c=wide)), X)
    ran.counts(conv2d=2, split_with_sizes=1)


def test_without_biases() -> None:
    given = {name: nn.Conv2d(6, 4, 3, 2, bias=False) for name in "abc"}
    run(PASS, program(branches, **given), X).counts(conv2d=1)


def test_a_bias_on_one_side_keeps_it_apart() -> None:
    ran = run(PASS, program(branches, **layers(b=nn.Conv2d(6, 3, 1, bias=False))), X)
    ran.counts(conv2d=2)


def test_a_weight_that_is_an_input_is_refused() -> None:
    def forward(m, x, w):
        return F.conv2d(x, w), F.conv2d(x, m.w)

    model = program(forward, w=randn(4, 6, 1, 1))
    run(PASS, model, X, randn(4, 6, 1, 1)).refuses("a weight is not a constant")


def test_a_bias_that_is_an_input_is_refused() -> None:
    def forward(m, x, b):
        return F.conv2d(x, m.w, b), F.conv2d(x, m.v, b)

    model = program(forward, w=randn(4, 6, 1, 1), v=randn(4, 6, 1, 1))
    run(PASS, model, X, randn(4)).refuses("a bias is not a constant")


def test_grouped_channels_are_refused() -> None:
    given = {name: nn.Conv2d(6, 6, 1, groups=6) for name in "abc"}
    run(PASS, program(branches, **given), X).refuses("the channels are in 6 groups")


def test_an_image_without_a_batch_is_refused() -> None:
    def forward(m, x):
        return m.a(x), m.b(x)

    run(PASS, program(forward, **layers()), X[0]).refuses("the input has no batch dimension")


class Basic(nn.Sequential):
    """A convolution with its batch norm and activation."""

    def __init__(self, before: int, after: int, size: int) -> None:
        conv = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(after), nn.ReLU())


class Inception(nn.Module):
    """Szegedy et al., Going deeper with convolutions (arXiv:1409.4842), figure 2b."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Basic(6, 4, 1)
        self.three = nn.Sequential(Basic(6, 3, 1), Basic(3, 5, 3))
        self.five = nn.Sequential(Basic(6, 2, 1), Basic(2, 3, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), Basic(6, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def test_an_inception_block() -> None:
    """Three of the convolutions of 1 by 1 read the block's input; the fourth reads what is pooled."""
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    ran = run(pipeline(3), Inception(), X, dynamic=dynamic)
    assert ran.kept["merge_convolutions"] == 1
    ran.counts(conv2d=1, conv_activation=3, batch_norm=0, split_with_sizes=1).agrees(randn(3, 6, 5, 8))
    run(pipeline(), Inception(), X).counts(conv2d=0, conv_activation=6, split_with_sizes=0)


def test_dynamic_sizes() -> None:
    ran = run(PASS, program(branches, **layers()), X, dynamic={"x": {0: "batch", 2: "height"}})
    ran.counts(conv2d=1).agrees(randn(1, 6, 4, 7)).agrees(randn(3, 6, 5, 7))
