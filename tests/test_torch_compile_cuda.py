"""``torch.compile(model, backend="graphopt")`` on a GPU: pieces in CUDA graphs, in half precision too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
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
from tests.test_torch_compile import Broken, Shared, _fresh, made

__all__ = ["_fresh", "made"]  # fixtures
pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def on_gpu(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return randomised(model).cuda().to(dtype)


def agrees(model: nn.Module, compiled: Callable[..., Any], *args: torch.Tensor, **kwargs: Any) -> None:
    """A call's outputs are as exact as the model's own."""
    before, after = model(*args, **kwargs), compiled(*args, **kwargs)
    double = copy.deepcopy(model).double()
    exact = double(*(x.double() for x in args), **kwargs)
    sides = [torch.utils._pytree.tree_leaves(side) for side in (before, after, exact)]
    verdict = compare(*sides, MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


@DTYPES
def test_pieces_between_graph_breaks_are_cuda_graphs(made: list[Any], dtype: torch.dtype) -> None:
    model = on_gpu(Broken(), dtype)
    compiled = torch.compile(model, backend="graphopt")
    for seed in range(4):
        agrees(model, compiled, randn(4, 8, seed=seed).cuda().to(dtype))
    assert len(made) >= 2
    for optimized, _ in made:
        assert {row["executor"] for row in optimized.report.plan} == {"cuda"}
        assert optimized.report.cuda_graphs["coverage"] == 1.0


def test_a_piece_that_serves_several_layers_has_each_ones_weights() -> None:
    model, x = on_gpu(Shared()), randn(4, 8).cuda()
    compiled = torch.compile(model, backend="graphopt")
    for _ in range(3):
        agrees(model, compiled, x)


def test_weights_written_to_in_place_are_seen(made: list[Any]) -> None:
    model, x = on_gpu(MLP()), randn(4, 8).cuda()
    compiled = torch.compile(model, backend="graphopt")
    compiled(x)
    for step in range(6):
        model.first.weight.mul_(1.5)
        for _ in range(2):
            agrees(model, compiled, x)
        assert len(made) == min(step + 2, 1 + torch_compile._RENEWALS)


@DTYPES
def test_sizes_that_vary_are_compiled_once(made: list[Any], dtype: torch.dtype) -> None:
    model = on_gpu(MLP(), dtype)
    compiled = torch.compile(model, backend="graphopt", dynamic=True)
    for batch in (3, 5, 2, 9, 5, 5, 3):
        agrees(model, compiled, randn(batch, 8, seed=batch).cuda().to(dtype))
    assert len(made) == 1
    (row,) = made[0][0].plan.rows()
    assert row["cuda_graphs"] >= 2  # of sizes that came again


def test_a_model_of_transformers_takes_keywords_in_half_precision(made: list[Any]) -> None:
    example = bert()
    model = example.model.cuda().half()
    kwargs = {name: x.cuda() for name, x in example.kwargs.items()}
    compiled = torch.compile(model, backend="graphopt")
    for _ in range(3):
        got = compiled(**kwargs)
    expected = model(**kwargs)
    assert type(got) is type(expected)
    exact = copy.deepcopy(model).double()(**kwargs)
    names = ("last_hidden_state", "pooler_output")
    sides = [[side[name] for name in names] for side in (expected, got, exact)]
    verdict = compare(*sides, MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason
    ((optimized, _),) = made
    assert optimized.report.ops_after["graphopt.attention"] == 2


def test_where_gradients_are_wanted_the_model_runs_as_it_is(made: list[Any]) -> None:
    model, x = on_gpu(MLP()).train(), randn(4, 8).cuda()
    compiled = torch.compile(model, backend="graphopt")
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(x).sum().backward()
    assert [w for w in caught if "graphopt compiles for inference" in str(w.message)]
    assert model.first.weight.grad is not None
    assert not made


def test_later_calls_do_not_change_what_older_ones_returned() -> None:
    """A piece's outputs are the next one's inputs, and graphs write to the same memory at every replay."""
    model = on_gpu(Broken())
    compiled = torch.compile(model, backend="graphopt")
    inputs = [randn(4, 8, seed=seed).cuda() for seed in range(6)]
    results = [compiled(x) for x in inputs]
    kept = [result.clone() for result in results]
    for x in reversed(inputs):
        compiled(x)
    assert all(torch.equal(result, before) for result, before in zip(results, kept, strict=True))


@pytest.mark.slow
def test_max_autotune_measures_the_ways_to_run_a_piece(made: list[Any]) -> None:
    model, x = on_gpu(MLP(), torch.float16), randn(4, 8).cuda().half()
    compiled = torch.compile(model, backend="graphopt", mode="max-autotune")
    for _ in range(2):
        agrees(model, compiled, x)
    optimized: OptimizedModel = made[0][0]
    assert optimized.report.chosen.ms is not None
    assert {"cuda", "inductor"} <= {row.name for row in optimized.report.candidates}


@pytest.mark.slow
def test_what_no_graph_can_hold_goes_to_inductor_where_that_is_faster() -> None:
    """Between its CUDA graphs, as one candidate among the others."""

    class Inverse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.linalg.inv(torch.tanh(x) + 3 * torch.eye(16, device=x.device)))

    model, x = Inverse().eval(), randn(16, 16).cuda()
    opt = graphopt.optimize(model, (x,))
    names = {row.name: row for row in opt.report.candidates}
    assert names["cuda + inductor"].ms is not None, names["cuda + inductor"].reason
    agrees(model, opt, x)
