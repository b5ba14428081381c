"""A candidate may err as much as the original does when rounding decides, and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphopt.compiler.evaluate import outputs
from graphopt.compiler.reference import Reference, computed, output_reference
from tests._models import randn
from tests.compiler._passes import graph_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def reference_of(function: Callable[..., object], *args: torch.Tensor) -> Reference:
    return output_reference(graph_of(function, *args), args, 8.0)


def cancelling(x: torch.Tensor) -> torch.Tensor:
    return (x + 1000.0) - 1000.0


def cancelling_otherwise(x: torch.Tensor) -> torch.Tensor:
    return ((x + 999.0) + 1.0) - 1000.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_a_sum_cancels_another_order_is_as_good(dtype: torch.dtype) -> None:
    x = randn(4, 64).to(dtype)
    assert reference_of(cancelling, x).compare([cancelling_otherwise(x)]).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_hides_no_fault(dtype: torch.dtype) -> None:
    x = randn(4, 64).to(dtype)
    reference = reference_of(lambda x: torch.tanh(x) * 2, x)
    good = torch.tanh(x) * 2
    assert reference.compare([good]).ok
    off = good * (1 + 64 * torch.finfo(dtype).eps)
    assert not reference.compare([off]).ok
    assert not reference.compare([torch.sin(x) * 2]).ok


def test_a_row_of_nothing_but_rounding() -> None:
    """What ReLU leaves of sums that cancel is a sign's work."""
    x = randn(16, 8)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x + 1e4) - (x.flip(-1) + 1e4) - (x - x.flip(-1)))

    other = torch.relu((x - x.flip(-1)) + (1e4 - 1e4) - (x - x.flip(-1)))
    assert reference_of(model, x).compare([other]).ok


def test_integers_and_infinities_stay_the_originals() -> None:
    x = randn(4, 8)
    reference = reference_of(lambda x: (x.relu().log(), x.argmax(-1)), x)
    good = [x.relu().log(), x.argmax(-1)]
    assert reference.compare(good).ok
    assert not reference.compare([good[0].nan_to_num(0.0, 0.0, 0.0), good[1]]).ok
    assert not reference.compare([good[0], good[1] + 1]).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_rounding_moves_numbers_by_a_unit_at_most(dtype: torch.dtype) -> None:
    x = randn(64, 64).abs().add(1).to(dtype)
    graph = graph_of(torch.relu, x)
    draw = torch.Generator().manual_seed(0)
    (moved,) = outputs(graph, [x], noise=draw)
    units = (moved.double() - x.double()) / (x.double() * torch.finfo(dtype).eps)
    assert units.abs().max() <= 1
    assert 0.05 < float((units != 0).double().mean()) < 0.95
    assert abs(float(units.mean())) < 0.05


def test_views_fills_and_integers_are_not_rounded() -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.tensor([0.0, lowest, -torch.inf, torch.inf])

    def model(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.relu(mask), torch.neg(mask), mask[:2], mask > 0

    graph = graph_of(model, mask)
    found = outputs(graph, [mask], noise=torch.Generator().manual_seed(0))
    for left, right in zip(computed(graph, found), model(mask), strict=True):
        assert torch.equal(left, right)
