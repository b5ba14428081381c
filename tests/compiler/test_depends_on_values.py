from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphopt.compiler.verify import _depends_on_values
from tests.compiler._passes import graph_of

SIZES_ONLY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ones of its type": lambda x: x.new_ones(3).cumsum(0),
    "zeros of its type": lambda x: x.new_zeros(2, 3) + 1,
    "filled of its type": lambda x: x.new_full((2,), 7.0),
    "ones of its shape": lambda x: torch.ones_like(x).tril(),
    "zeros of its shape": torch.zeros_like,
    "filled of its shape": lambda x: torch.full_like(x, -1.0).triu(1),
    "a range over its size": lambda x: torch.arange(x.shape[-1]),
    "expanded to its shape": lambda x: torch.arange(4.0).expand_as(x),
    "cast to its type": lambda x: torch.arange(4).type_as(x),
}

VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "its own": lambda x: x + 1,
    "a cast": lambda x: x.type_as(torch.ones(1, dtype=torch.float64)),
    "ones beside it": lambda x: torch.ones_like(x) * x,
    "expanded to its own shape": lambda x: x.expand_as(x).sin(),
    "of the shape, then of it": lambda x: torch.zeros_like(x).add(x.sum()),
}


@pytest.mark.parametrize("function", SIZES_ONLY.values(), ids=SIZES_ONLY)
def test_what_only_sizes_decide(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    (result,) = graph_of(function, torch.randn(2, 4)).output.args[0]
    assert not _depends_on_values(result)


@pytest.mark.parametrize("function", VALUES.values(), ids=VALUES)
def test_what_values_decide(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    (result,) = graph_of(function, torch.randn(2, 4)).output.args[0]
    assert _depends_on_values(result)
