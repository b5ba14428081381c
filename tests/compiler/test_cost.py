"""Costs against counts by hand: a multiply-add is two operations, every operand is moved once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.cost import milliseconds, node_cost
from graphopt.compiler.device import Limits
from graphopt.ir.op import Cost
from tests._models import FAMILIES, randn
from tests.capture._run import captured


class Of(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


LINEAR = (randn(2, 3, 8), randn(5, 8), randn(5))
CONV = (randn(2, 6, 9, 9), randn(4, 3, 3, 3))
ATTENTION = (randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 6))
NORM = (randn(4, 6), randn(6), randn(6))
TABLE = (torch.arange(6).reshape(2, 3), randn(100, 8))

BY_HAND: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], float, float]] = {
    "linear": (F.linear, LINEAR, 2 * 6 * 8 * 5, 4 * (48 + 40 + 5 + 30)),
    "conv2d": (
        lambda x, w: F.conv2d(x, w, groups=2),
        CONV,
        2 * (2 * 4 * 7 * 7) * (3 * 3 * 3),
        4 * (972 + 108 + 392),
    ),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        ATTENTION,
        2 * 6 * (5 * 7 * 8 + 5 * 7 * 6),
        4 * (240 + 336 + 252 + 180),
    ),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), NORM, 24, 4 * (24 + 6 + 6 + 24)),
    "matmul": (torch.matmul, (randn(2, 3, 4), randn(2, 4, 5)), 2 * 2 * 3 * 4 * 5, 4 * (24 + 40 + 30)),
    "einsum": (
        lambda x, w: torch.einsum("b...i, oi -> b...o", x, w),
        LINEAR[:2],
        2 * 6 * 8 * 5,
        4 * (48 + 40 + 30),
    ),
    "transposed convolution": (
        F.conv_transpose2d,
        (randn(2, 4, 5, 5), randn(4, 3, 2, 2)),
        2 * (2 * 4 * 5 * 5) * (3 * 2 * 2),
        4 * (200 + 48 + 216),
    ),
    "add": (torch.add, (randn(3, 4), randn(4)), 12, 4 * (12 + 4 + 12)),
    "embedding": (F.embedding, TABLE, 48, 8 * 6 + 4 * (48 + 48)),
    "transpose": (lambda x: x.transpose(0, 1), (randn(3, 4),), 0, 0),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("dynamic", [False, True])
def test_costs_equal_counts_by_hand(name: str, dynamic: bool) -> None:
    function, args, flops, moved = BY_HAND[name]
    graph = capture(Of(function).eval(), args, dynamic=dynamic or None)
    costs = [node_cost(node) for node in graph.calls]
    assert sum(cost.flops for cost in costs) == flops
    assert sum(cost.bytes for cost in costs) == moved


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_has_a_cost(family: str) -> None:
    costs = [node_cost(node) for node in captured(family, dynamic=True).nodes]
    assert all(0 <= cost.flops < 1e9 and 0 <= cost.bytes < 1e9 for cost in costs)
    assert sum(cost.flops for cost in costs) > 2e3


def test_the_roofline_is_the_longer_of_computing_and_moving() -> None:
    limits = Limits("test", flops_per_s=1e9, bytes_per_s=1e6)
    assert milliseconds(Cost(2e9, 1e6), limits) == 2000.0
    assert milliseconds(Cost(1e6, 3e6), limits) == 3000.0
    assert milliseconds(Cost(0.0, 0.0), limits) == 0.0
