"""``torch.compile(model, backend="graphopt")``: pieces, their weights, and what is left as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import torch_compile
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.optimized_model import OptimizedModel
from tests._models import MLP, bert, randn, randomised


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch_compile._warn.cache_clear()
    with torch.no_grad():
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[OptimizedModel, dict[str, Any]]]:
    """Every model that the backend makes, with the options."""
    found: list[tuple[OptimizedModel, dict[str, Any]]] = []

    def optimize(*args: Any, **options: Any) -> OptimizedModel:
        found.append((graphopt.optimize(*args, **options), options))
        return found[-1][0]

    monkeypatch.setattr(torch_compile, "optimize", optimize)
    return found


def agrees(model: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """A call's outputs are as exact as the model's own."""
    before, after = model(*args, **kwargs), compiled(*args, **kwargs)
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    reference = model.double()(*double, **kwargs)
    model.float()
    sides = [torch.utils._pytree.tree_leaves(side) for side in (before, after, reference)]
    verdict = compare(*sides, MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


def test_the_backend_is_found_by_its_name(made: list[Any]) -> None:
    model, x = randomised(MLP()), randn(3, 8)
    compiled = torch.compile(model, backend="graphopt")
    first = compiled(x)
    second = compiled(x)
    torch.testing.assert_close(first, second)
    assert len(made) == 1
    assert made[0][1]["effort"] == "fast"


def test_a_model_of_transformers_is_one_piece_with_its_fusions(made: list[Any]) -> None:
    example = bert()
    compiled = torch.compile(example.model, backend="graphopt")
    for _ in range(2):
        got = compiled(**example.kwargs)
    assert type(got) is type(example())
    torch.testing.assert_close(got.last_hidden_state, example().last_hidden_state, atol=1e-5, rtol=1e-5)
    ((optimized, _),) = made
    assert optimized.report.ops_after["graphopt.attention"] == 2
    assert optimized.report.ops_after["graphopt.add_layer_norm"] == 4


class Broken(nn.Module):
    """A graph break in the middle of every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
            torch._dynamo.graph_break()
            x = torch.tanh(x) * 2
        return x


def test_pieces_between_graph_breaks_are_optimized_each(made: list[Any]) -> None:
    model = randomised(Broken())
    compiled = torch.compile(model, backend="graphopt")
    compiled(randn(4, 8))
    compiled(randn(4, 8))
    assert len(made) >= 2
    for seed in range(3):
        agrees(model, torch.compile(model, backend="graphopt"), randn(4, 8, seed=seed))


class Shared(nn.Module):
    """Two layers whose forward, broken off, is compiled once for both."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return torch.tanh(self.inner(x))

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Shared.Layer(), Shared.Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_a_piece_that_serves_several_layers_has_each_ones_weights() -> None:
    model, x = randomised(Shared()), randn(4, 8)
    compiled = torch.compile(model, backend="graphopt")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-6)


def test_weights_written_to_in_place_are_seen(made: list[Any]) -> None:
    model, x = randomised(MLP()), randn(4, 8)
    compiled = torch.compile(model, backend="graphopt")
    compiled(x)
    for step in range(6):
        model.first.weight.mul_(1.5)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
        assert len(made) == min(step + 2, 1 + torch_compile._RENEWALS)


def test_sizes_that_vary_are_compiled_once(made: list[Any]) -> None:
    model = randomised(MLP())
    compiled = torch.compile(model, backend="graphopt", dynamic=True)
    for batch in (3, 5, 2, 9, 5):
        x = randn(batch, 8, seed=batch)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-6)
    assert len(made) == 1
    assert made[0][1]["dynamic"] == {"tensors[0]": {0: _only(made[0][1]["dynamic"])}}


def _only(dynamic: dict[str, dict[int, str]]) -> str:
    return dynamic["tensors[0]"][0]


def test_a_number_that_varies_is_part_of_the_key() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
            return torch.tanh(x) * times

    model, x = Scaled().eval(), randn(4, 8)
    compiled = torch.compile(model, backend="graphopt", dynamic=True)
    for times in (2, 3, 3, 2, 7, 7):
        torch.testing.assert_close(compiled(x, times), model(x, times))


def test_where_gradients_are_wanted_the_model_runs_as_it_is_with_one_warning(made: list[Any]) -> None:
    model, x = randomised(Broken()), randn(4, 8)
    compiled = torch.compile(model, backend="graphopt")
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(x).sum().backward()
    said = [warning for warning in caught if "graphopt" in str(warning.message)]
    assert len(said) == 1
    assert "torch.no_grad()" in str(said[0].message)
    assert model.blocks[0].first.weight.grad is not None
    assert not made


def test_a_view_of_an_input_stays_a_view(made: list[Any]) -> None:
    class View(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.view(-1)
            torch._dynamo.graph_break()
            y.add_(1)
            return x

    compiled = torch.compile(View(), backend="graphopt")
    for _ in range(3):
        x = torch.zeros(2, 3)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            assert torch.equal(compiled(x), torch.ones(2, 3))


def test_what_writes_its_state_runs_as_it_is_and_says_so(made: list[Any]) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return torch.tanh(x) + self.count

    model = Counts().eval()
    compiled = torch.compile(model, backend="graphopt")
    with pytest.warns(
        UserWarning, match="graphopt leaves a piece of the model as it is: CaptureError.*writes"
    ):
        compiled(torch.zeros(2))
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 2.0))
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 3.0))
    assert not made


def test_options_reach_the_optimization(made: list[Any]) -> None:
    model, x = randomised(MLP()), randn(4, 8)
    options = {"executors": ("eager",), "level": 0}
    compiled = torch.compile(model, backend="graphopt", options=options)
    compiled(x)
    ((optimized, given),) = made
    assert given["level"] == 0
    assert {row["executor"] for row in optimized.report.plan} == {"eager"}
    torch.testing.assert_close(compiled(x), model(x))


def test_max_autotune_measures(made: list[Any]) -> None:
    compiled = torch.compile(randomised(MLP()), backend="graphopt", mode="max-autotune")
    compiled(randn(4, 8))
    assert made[0][0].report.chosen.ms is not None
