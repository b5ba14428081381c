from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.capture.export import capture
from graphopt.compiler import evaluate as evaluation
from graphopt.compiler.compare import relative_error
from graphopt.compiler.evaluate import Activations, evaluate, outputs
from graphopt.ir.graph import Graph
from tests._models import randn

X = randn(3, 4)


class Casts(nn.Module):
    """Goes through float16 and back, and makes a float32 table of its own."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = (x / 3).to(torch.float16).float()
        return low * torch.arange(4, dtype=torch.float32) / 7, x > 0


class Forked(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(x) + 1, torch.linalg.inv(x)


def node(graph: Graph, op: str) -> torch.fx.Node:
    (found,) = (node for node in graph.calls if op in str(node.target))
    return found


def test_float64_goes_through_explicit_casts() -> None:
    graph = capture(Casts().eval(), (X,))
    wide, mask = outputs(graph, [X], float64=True)
    wanted = X.double() / 3 * torch.arange(4, dtype=torch.float64) / 7
    assert wide.dtype == torch.float64
    assert relative_error(wide, wanted) < 1e-15
    assert mask.dtype == torch.bool
    narrow, _ = outputs(graph, [X])
    assert narrow.dtype == torch.float32
    assert relative_error(narrow, wanted) > 1e-6


class Vocabulary(nn.Module):
    """A table that is looked up, and a projection to as many numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(999, 16), nn.Linear(16, 999)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


class Largest(TorchDispatchMode):
    """The numbers of the largest float64 tensor that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.numel = max(self.numel, result.untyped_storage().nbytes() // 8)
        return result


def test_float64_widens_no_large_weight_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = Vocabulary().eval(), torch.tensor([[3, 998, 0]])
    graph = capture(model, (ids,))
    monkeypatch.setattr(evaluation, "_LARGE", 1000)  # 62 rows at a time, the last part shorter
    with Largest() as largest:
        (found,) = outputs(graph, [ids], float64=True)
    assert largest.numel == found.numel() == 3 * 999
    with torch.no_grad():
        wanted = model.double()(ids)
    assert relative_error(found, wanted) < 1e-15


def test_nothing_is_run_that_is_not_needed() -> None:
    graph = capture(Forked().eval(), (X[:3, :3],))
    singular = torch.zeros(3, 3)
    with pytest.raises(torch.linalg.LinAlgError):
        outputs(graph, [singular])
    given = dict(zip(graph.placeholders, [singular], strict=True))
    (found,) = evaluate(graph, [node(graph, "relu")], given)
    assert torch.equal(found, singular)
    (found,) = evaluate(graph, [node(graph, "add")], {node(graph, "relu"): X[:3, :3]})
    assert torch.equal(found, X[:3, :3] + 1)


def test_a_missing_input_is_named() -> None:
    graph = capture(Forked().eval(), (X[:3, :3],))
    with pytest.raises(ValueError, match="no value was given for input x"):
        evaluate(graph, [node(graph, "relu")], {})


@torch.library.custom_op("graphopt_tests::single_only", mutates_args=())
def single_only(x: torch.Tensor) -> torch.Tensor:
    """Doubles float32, and nothing else."""
    if x.dtype != torch.float32:
        raise ValueError("float32 only")
    return x * 2


@single_only.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Single(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return single_only(x / 3) / 3


def test_an_op_without_float64_runs_in_its_own_precision() -> None:
    graph = capture(Single().eval(), (X,))
    (found,) = outputs(graph, [X], float64=True)
    assert found.dtype == torch.float64
    assert torch.equal(found, (X.double() / 3).float().mul(2).double() / 3)


def test_complex_values_are_widened_too() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft(x)

    graph = capture(Spectrum().eval(), (X,))
    (found,) = outputs(graph, [X], float64=True)
    assert torch.equal(found, torch.fft.fft(X.double()))


def test_outputs_are_repeated_and_literals_kept() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> list[object]:
            y = x + 1
            return [y, None, y, x, 3]

    found = outputs(capture(Odd().eval(), (X,)), [X])
    assert [type(item) for item in found] == [torch.Tensor, type(None), torch.Tensor, torch.Tensor, int]
    assert torch.equal(found[0], X + 1)
    assert torch.equal(found[2], X + 1)
    assert torch.equal(found[3], X)


def test_activations_are_those_of_the_example_inputs() -> None:
    graph = capture(Forked().eval(), (X[:3, :3],))
    activations = Activations(graph, [X[:3, :3]])
    for _ in range(2):  # computed, then remembered
        (found,) = activations.values([node(graph, "relu")])
        assert torch.equal(found, torch.relu(X[:3, :3]))
