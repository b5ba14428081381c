"""Ranges of values inside a graph: of channels, over calls, and where they are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.calibration import Range, keep, observe, observed
from tests._models import randn
from tests.passes._harness import program

X = randn(3, 5, 16)


def of(low: list[float], high: list[float]) -> Range:
    return Range(torch.tensor(low), torch.tensor(high))


def test_each_channel_has_its_own_range() -> None:
    value = torch.stack([X - 10, X, X + 10], dim=1)  # (3, 3, 5, 16)
    found = Range.of(value, 1)
    assert found.low.tolist() == pytest.approx([float(X.min()) - 10, float(X.min()), 0.0])
    assert found.high.tolist() == pytest.approx([0.0, float(X.max()), float(X.max()) + 10])


@pytest.mark.parametrize(
    ("low", "high", "step", "zero"),
    [
        ([-1.0, -2.0], [253.0, 0.0], 1.0, 2),
        ([0.0], [2.55], 0.01, 0),
        ([-2.55], [0.0], 0.01, 255),
        ([-1.0], [1.0], 2 / 255, 128),
    ],
)
def test_codes_reach_from_end_to_end(low: list[float], high: list[float], step: float, zero: int) -> None:
    assert of(low, high).fixed() == (pytest.approx(step), zero)


@pytest.mark.parametrize(
    ("found", "sound"),
    [
        (of([-1.0], [1.0]), True),
        (of([0.0], [1e-20]), True),
        (of([0.0, 0.0], [0.0, 0.0]), False),
        (of([0.0], [float("inf")]), False),
        (of([float("nan")], [1.0]), False),
    ],
)
def test_what_has_steps(found: Range, sound: bool) -> None:
    assert found.is_sound == sound


def test_a_range_is_that_of_all_calls() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.layer(x).relu()

    layer = nn.Linear(16, 4)
    graph = capture(program(forward, layer=layer), (X,), {})
    x, linear = graph.placeholders[0], graph.calls[0]
    found = observe(graph, [(x, -1), (linear, -1), (linear, 1)], [[X], [3 * X], [X]])
    torch.testing.assert_close(found[x, -1].high, 3 * X.amax((0, 1)).clamp_min(0))
    with torch.no_grad():
        values = torch.cat([layer(X), layer(3 * X)])
    torch.testing.assert_close(found[linear, -1].low, values.amin((0, 1)).clamp_max(0))
    torch.testing.assert_close(found[linear, 1].low, values.amin((0, 2)).clamp_max(0))


def test_a_range_stays_with_its_node() -> None:
    graph = capture(program(lambda m, x: x.relu()), (X,), {})
    (node,) = graph.calls
    assert observed(node, "x") is None
    keep(node, x=of([-1.0], [1.0]), out=None)
    assert observed(node, "out") is None
    (copied,) = graph.clone().calls
    assert observed(copied, "x") == observed(node, "x") is not None
    snapshot = graph.snapshot()
    graph.restore(snapshot)
    assert observed(graph.calls[0], "x") is not None
