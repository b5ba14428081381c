"""Batching real models: what the captured sizes allow, and what the first batches prove or refute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import InputError
from graphopt.runtime.serving.batcher import Batcher
from graphopt.runtime.serving.layout import Layout, Sizes, layout_of
from tests._models import MLP, minilm, padding, randn, randomised, tokens
from tests.runtime.serving._cheap import LAYOUT

DYNAMIC = {"x": {0: "batch", 1: "seq"}}


class Function(nn.Module):
    """A model from a function of its inputs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def optimized(model: Any, *args: Any, dynamic: Any, executors: Any = ("eager",), **kwargs: Any) -> Any:
    if not isinstance(model, nn.Module):
        model = Function(model)
    return graphopt.optimize(model.eval(), args, kwargs, dynamic=dynamic, effort="fast", executors=executors)


def together(opt: Any, requests: list[tuple[torch.Tensor, ...]], **options: Any) -> tuple[list[Any], Any]:
    """The answers of requests that wait for each other, and the session's statistics."""
    with opt.session(max_batch=32, max_wait_ms=60_000, **options) as session:
        futures = [session.submit(*request) for request in requests]
    return [future.result(0) for future in futures], session.stats()


def same(found: Any, expected: Any) -> None:
    exact = [leaf.double() for leaf in torch.utils._pytree.tree_leaves(expected)]
    verdict = compare(expected, found, exact, 2 * MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


# Models


@pytest.fixture(scope="module")
def embedder() -> Any:
    example = minilm()
    return optimized(example.model, dynamic=example.dynamic, executors=("ort", "eager"), **example.kwargs)


def test_an_encoder_is_batched_and_padded(embedder: Any) -> None:
    requests = [(tokens(1, n, seed=n), padding((n,), n)) for n in (3, 5, 16, 9, 7, 30)]
    answers, stats = together(embedder, requests)
    for request, answer in zip(requests, answers, strict=True):
        same(answer, embedder(*request))
    assert stats["batch_rows"] == {6: 1}
    assert stats["padding"] > 0
    assert stats["remarks"] == []


def test_where_padding_is_removed_all_lengths_share_a_batch_unless_edges_are_given(embedder: Any) -> None:
    assert embedder.plan.padded is not None
    requests = [(tokens(1, n, seed=n), padding((n,), n)) for n in (3, 5, 16, 9, 7, 30)]
    _, stats = together(embedder, requests, buckets=(16, 32))
    assert stats["batch_rows"] == {1: 1, 5: 1}


def test_results_of_padded_requests_have_their_own_lengths() -> None:
    opt = optimized(lambda x: {"y": x.exp(), "pair": (x[..., 0], x.sum(-1))}, randn(3, 6, 8), dynamic=DYNAMIC)
    requests = [(randn(1, n, 8, seed=n),) for n in (3, 5, 16)]
    answers, stats = together(opt, requests)
    for (x,), answer in zip(requests, answers, strict=True):
        same(answer, opt(x))
    assert stats["batch_rows"] == {3: 1}


def test_requests_of_several_rows() -> None:
    opt = optimized(randomised(MLP()), randn(3, 8), dynamic={"x": {0: "batch"}})
    requests = [(randn(rows, 8, seed=rows),) for rows in (1, 4, 2)]
    answers, stats = together(opt, requests)
    for (x,), answer in zip(requests, answers, strict=True):
        same(answer, opt(x))
    assert stats["batch_rows"] == {7: 1}


def test_two_lengths() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 2 * x, y.sum(-1)

    dynamic = {"x": {0: "batch", 1: "source"}, "y": {0: "batch", 1: "target"}}
    opt = optimized(Pair(), randn(3, 6), randn(3, 4, 8), dynamic=dynamic)
    layout = layout_of(opt._sizes, None, {"source": (8, 16), "target": (4,)}, {})
    assert isinstance(layout, Layout)
    assert layout.names == ("source", "target")
    assert layout.bucket((6, 5)) == (8, 5)
    requests = [(randn(1, 6), randn(1, 2, 8)), (randn(2, 7), randn(2, 4, 8))]
    answers, stats = together(opt, requests, buckets={"source": (8, 16), "target": (4,)})
    for request, answer in zip(requests, answers, strict=True):
        same(answer, opt(*request))
    assert stats["batch_rows"] == {3: 1}


def test_a_wrong_request_is_refused_alone() -> None:
    opt = optimized(randomised(MLP()), randn(3, 8), dynamic={"x": {0: "batch"}})
    with opt.session(max_wait_ms=60_000) as session:
        future = session.submit(randn(2, 8))
        with pytest.raises(InputError, match=r"has dtype torch\.float64"):
            session.submit(randn(2, 8).double())
        with pytest.raises(InputError, match="has size 7 in dimension 1"):
            session.submit(randn(2, 7))
    assert future.result(0).shape == (2, 8)


def test_a_token_that_is_not_in_the_vocabulary_fails_alone(embedder: Any) -> None:
    mask = padding((4,), 4)
    requests = [(tokens(1, 4), mask), (torch.full((1, 4), 9999), mask), (tokens(1, 4, seed=1), mask)]
    with embedder.session(max_batch=8, max_wait_ms=60_000) as session:
        futures = [session.submit(*request) for request in requests]
    with pytest.raises(Exception, match=r"indices|index"):
        futures[1].result(0)
    same(futures[2].result(0), embedder(*requests[2]))


# What the first batches refute


def test_rows_that_depend_on_each_other_run_one_by_one() -> None:
    opt = optimized(lambda x: x - x.mean(0), randn(3, 8), dynamic={"x": {0: "batch"}})
    requests = [(randn(2, 8, seed=seed),) for seed in range(4)]
    answers, stats = together(opt, requests)
    for (x,), answer in zip(requests, answers, strict=True):
        same(answer, opt(x))
    (remark,) = stats["remarks"]
    assert remark.startswith("requests run one by one: rows depend on each other: error ")


def test_padding_that_changes_results_is_given_up_and_equal_lengths_still_share() -> None:
    opt = optimized(lambda x: x - x.mean(1, keepdim=True), randn(3, 6, 8), dynamic=DYNAMIC)
    with opt.session(max_batch=3, max_wait_ms=60_000) as session:
        for lengths in ((3, 4, 5), (3, 3, 3)):
            inputs = [randn(1, n, 8, seed=seed) for seed, n in enumerate(lengths)]
            for x, future in zip(inputs, [session.submit(x) for x in inputs], strict=True):
                same(future.result(60), opt(x))
    stats = session.stats()
    assert stats["batch_rows"] == {3: 2}
    (remark,) = stats["remarks"]
    assert remark.startswith("only requests of equal lengths share a batch: padding changes results")


def test_proof_is_asked_for_a_few_times_and_then_taken() -> None:
    calls: list[int] = []

    def program(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(tensors[0].shape[0])
        return [2 * tensors[0]]

    batcher = Batcher(program, LAYOUT, lambda t: None, floor_ulps=8, verify=2, max_batch=8)
    for _ in range(4):
        assert batcher.serve([[torch.ones(1, 3)], [torch.ones(2, 3)]])
    assert calls == [3, 1, 2, 3, 1, 2, 3, 3]


def test_on_a_gpu_shapes_come_again() -> None:
    """Lengths are those of the bucket and rows a power of two: a CUDA graph is found for them."""
    shapes: list[tuple[int, ...]] = []

    def program(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        shapes.append(tuple(tensors[0].shape))
        return [2 * tensors[0]]

    batcher = Batcher(program, LAYOUT, lambda t: None, floor_ulps=8, verify=0, to_bucket=True, max_batch=6)
    requests = [[torch.full((1, n), float(n))] for n in (5, 7, 6)]
    for request, answer in zip(requests, batcher.serve(requests), strict=True):
        assert torch.equal(answer[0], 2 * request[0])
    assert torch.equal(batcher.serve([[torch.ones(1, 3)]])[0][0], 2 * torch.ones(1, 3))
    batcher.serve([[torch.ones(5, 4)]])
    assert shapes == [(4, 8), (1, 4), (6, 4)]


# What the sizes allow


def sizes(forward: Callable[[torch.Tensor], Any], *shape: int, dynamic: Any = None) -> Sizes:
    dynamic = dynamic or DYNAMIC
    sizes: Sizes = optimized(forward, randn(*shape), dynamic=dynamic)._sizes
    return sizes


def rows(found: Sizes, batch: str | None = None) -> tuple[int, ...]:
    layout = layout_of(found, batch, True, {})
    assert isinstance(layout, Layout)
    return layout.rows


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.sum(0),  # no batch in the output
        lambda x: x.flatten(0, 1),  # it is part of another size
        lambda x: x.sum((1, 2))[:, None] * x.sum((1, 2)),  # it stands there twice
        lambda x: (x, x.shape[0]),  # the size itself
        lambda x: x[x[:, 0, 0] > 0],  # a size that depends on values
    ],
)
def test_outputs_that_cannot_be_split(forward: Callable[[torch.Tensor], Any]) -> None:
    found = layout_of(sizes(forward, 3, 4, 8), None, True, {})
    assert found == "no dynamic dimension stands once in every input and every output"


def test_without_a_dynamic_batch_requests_run_one_by_one() -> None:
    opt = optimized(randomised(MLP()), randn(3, 8), dynamic=None)
    answers, stats = together(opt, [(randn(3, 8, seed=n),) for n in range(3)])
    assert len(answers) == 3
    assert stats["batch_rows"] == {1: 3}
    assert stats["remarks"] == [
        "requests run one by one: no dynamic dimension stands once in every input and every output"
    ]


def test_the_batch_is_called_so_or_named_or_comes_first() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    named = sizes(forward, 4, 3, 8, dynamic={"x": {0: "seq", 1: "batch"}})
    assert rows(named) == (1,)
    assert rows(named, "seq") == (0,)
    unnamed = sizes(forward, 4, 3, 8, dynamic={"x": {0: "n", 1: "m"}})
    assert rows(unnamed) == (0,)


def test_a_size_that_is_computed_is_not_padded() -> None:
    opt = optimized(lambda x: x[:, 1:], randn(3, 6, 8), dynamic=DYNAMIC)
    requests = [(randn(1, n, 8, seed=n),) for n in (3, 4, 4)]
    answers, stats = together(opt, requests)
    for (x,), answer in zip(requests, answers, strict=True):
        same(answer, x[:, 1:])
    assert stats["batch_rows"] == {1: 1, 2: 1}
    assert "a size is computed from a length" in stats["remarks"][0]


def test_padding_with_a_value() -> None:
    opt = optimized(lambda x: x.amin(1), randn(3, 6, 8), dynamic=DYNAMIC)
    requests = [(randn(1, n, 8, seed=n),) for n in (3, 5, 16)]
    answers, stats = together(opt, requests, pad={"x": float("inf")}, buckets=(16,))
    for (x,), answer in zip(requests, answers, strict=True):
        same(answer, x.amin(1))
    assert stats["batch_rows"] == {3: 1}
    assert stats["remarks"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "max_batch=0 is too small"),
        ({"max_wait_ms": -1}, "max_wait_ms=-1 is too small"),
        ({"queue_size": 0}, "queue_size=0 is too small"),
        ({"buckets": (32, 16)}, "buckets has [32, 16] for 'seq'"),
        ({"buckets": {"sek": (16,)}}, "buckets names 'sek', which is no dynamic length"),
        ({"batch": "rows"}, "no dynamic dimension is called 'rows'"),
        ({"pad": {"y": 0}}, "pad names the input 'y'"),
        ({"deadline_ms": -1}, "deadline_ms=-1 is no time"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: str) -> None:
    opt = optimized(lambda x: 2 * x, randn(3, 6, 8), dynamic=DYNAMIC)
    before = threading.active_count()
    with pytest.raises(InputError) as error:
        opt.session(**options)
    assert error.value.message == words
    assert threading.active_count() == before


# The model itself


@pytest.mark.parametrize(
    "executors", [("eager",), ("ort",), pytest.param(("inductor",), marks=pytest.mark.slow)]
)
def test_an_optimized_model_is_safe_to_call_from_several_threads(executors: tuple[str, ...]) -> None:
    opt = optimized(randomised(MLP()), randn(3, 8), dynamic={"x": {0: "batch"}}, executors=executors)
    inputs = [randn(n % 5 + 2, 8, seed=n) for n in range(64)]
    expected = [opt(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for found, answer in zip(pool.map(opt, inputs), expected, strict=True):
            same(found, answer)
