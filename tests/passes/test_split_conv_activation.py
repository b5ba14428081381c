from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.kernels._activations import TORCH
from graphopt.kernels.conv_activation import OP
from graphopt.passes.split_conv_activation import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 8, 6, 6)
PLAIN: Any = ([1, 1], [1, 1], [1, 1], 1)


def fused(activation: str, residual: bool, weight: torch.Tensor | None = None) -> Any:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return OP.overload(x, m.weight, m.bias, *PLAIN, activation, 0.7, x if residual else None)

    return program(forward, weight=randn(8, 8, 3, 3) if weight is None else weight, bias=randn(8))


def test_a_shortcut_and_an_activation() -> None:
    run(PASS, fused("relu", residual=True), X).becomes(
        before="""
            %0 = graphopt.conv_activation(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, relu, 0.7, x)
            return %0
        """,
        expected="""
            %0 = conv2d(x, weight, bias, [1, 1], [1, 1], [1, 1], 1)
            %1 = add(%0, x)
            %2 = relu(%1)
            return %2
        """,
    )


@pytest.mark.parametrize("activation", sorted(TORCH.keys() - {"relu", "none"}))
def test_every_activation(activation: str) -> None:
    ran = run(PASS, fused(activation, residual=False), X)
    assert "graphopt.conv_activation" not in ran.graph.op_counts()


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_what_codes_can_say_stays(activation: str) -> None:
    run(PASS, fused(activation, residual=False), X).stays()


def test_a_row_of_samples_stays() -> None:
    """Only images are convolved in 8 bits."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return OP.overload(x, m.weight, None, [1], [1], [1], 1, "silu")

    run(PASS, program(forward, weight=randn(8, 8, 3)), X[..., 0]).stays()
