"""Calling an optimized model: like the original, or one clear refusal."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import GraphoptError, InputError
from graphopt.optimized_model import OptimizedModel
from tests._models import MLP, randn, randomised
from tests.capture._run import same


class Scaled(nn.Module):
    """Positional, keyword, nested, plain and optional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self,
        x: torch.Tensor,
        scale: float = 1.0,
        *,
        more: dict[str, Any] | None = None,
        mode: str = "plain",
    ) -> dict[str, torch.Tensor]:
        y = self.linear(x) * scale
        if more is not None:
            y = y + more["a"][0]
        return {mode: y}


MODEL = randomised(Scaled())
X = randn(3, 8)
A = randn(3, 8, seed=1)


def optimized(*args: Any, executors: Any = ("eager",), **kwargs: Any) -> OptimizedModel:
    options = {key: kwargs.pop(key) for key in ("dynamic", "on_mismatch") if key in kwargs}
    return graphopt.optimize(MODEL, args, kwargs, executors=executors, effort="fast", **options)


@pytest.fixture(scope="module", params=["eager", "ort"])
def opt(request: pytest.FixtureRequest) -> OptimizedModel:
    """Called with x at (batch, 8), a scale of 2, more and a mode."""
    dynamic = {"x": {0: "batch"}, "more": {0: "batch"}}
    executors = (request.param, "eager")
    return optimized(X, 2.0, more={"a": [A]}, mode="up", dynamic=dynamic, executors=executors)


@pytest.fixture(scope="module")
def fixed() -> OptimizedModel:
    return optimized(X, more={"a": [A]})


def wanted(x: torch.Tensor, a: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"up": MODEL.linear(x) * 2.0 + a}


def close(found: dict[str, torch.Tensor], x: torch.Tensor, a: torch.Tensor) -> None:
    verdict = graphopt.compiler.compare.compare(
        wanted(x, a), found, {"up": wanted_wide(x, a)}, graphopt.compiler.tolerance.REGION_FLOOR_ULPS
    )
    assert verdict.ok, verdict.reason


def wanted_wide(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    weight, bias = MODEL.linear.weight.detach().double(), MODEL.linear.bias.detach().double()
    return (x.double() @ weight.T + bias) * 2.0 + a.double()


# Calls that fit


def test_every_spelling_of_a_call_is_the_same_call(opt: OptimizedModel) -> None:
    more = {"a": [A]}
    first = opt(X, 2.0, more=more, mode="up")
    close(first, X, A)
    assert same(first, opt(X, scale=2.0, mode="up", more=more))
    assert same(first, opt(mode="up", more=more, scale=2.0, x=X))


def test_a_default_may_be_left_out_or_spelled_out() -> None:
    opt = optimized(X)
    first = opt(X)
    assert same(first, opt(x=X))
    assert same(first, opt(X, 1.0, more=None, mode="plain"))


def test_other_sizes_strides_and_gradients(opt: OptimizedModel) -> None:
    for x, a in (
        (randn(5, 8), randn(5, 8, seed=1)),
        (randn(1, 8), randn(1, 8, seed=1)),
        (randn(8, 4).T, randn(4, 16)[:, ::2]),
        (randn(1, 8).expand(3, 8), A),
        (randn(3, 8).requires_grad_(), A.clone().requires_grad_()),
    ):
        found = opt(x, 2.0, more={"a": [a]}, mode="up")
        assert not found["up"].requires_grad
        close(found, x.detach(), a.detach())


def test_results_are_fresh(opt: OptimizedModel) -> None:
    first = opt(X, 2.0, more={"a": [A]}, mode="up")
    copy = first["up"].clone()
    second = opt(X * 3, 2.0, more={"a": [A]}, mode="up")
    assert torch.equal(first["up"], copy)
    assert not torch.equal(first["up"], second["up"])
    first["up"].zero_()
    close(opt(X, 2.0, more={"a": [A]}, mode="up"), X, A)


def test_calls_from_several_threads_do_not_mix(opt: OptimizedModel) -> None:
    inputs = [
        (randn(1 + seed % 5, 8, seed=seed), randn(1 + seed % 5, 8, seed=50 + seed)) for seed in range(16)
    ]
    found: dict[int, Any] = {}
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for _ in range(5):
            for index in range(worker, 16, 4):
                x, a = inputs[index]
                found[index] = opt(x, 2.0, more={"a": [a]}, mode="up")
                close(found[index], x, a)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    for index, (x, a) in enumerate(inputs):
        close(found[index], x, a)


def test_an_input_that_is_returned_and_a_constant() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", randn(4))

        def forward(self, x: torch.Tensor) -> list[Any]:
            y = x * 2
            return [x, self.table, y, None, y, 3, "text"]

    model = Odd().eval()
    for executors in (("eager",), ("ort", "eager"), None):
        opt = graphopt.optimize(model, (X,), executors=executors, dynamic={"x": {0: "n"}}, effort="fast")
        later = randn(5, 8, seed=4)
        assert same(opt(later), model(later))


# Calls that do not fit


def refusal(opt: OptimizedModel, *args: Any, **kwargs: Any) -> InputError:
    with pytest.raises(InputError) as error:
        opt(*args, **kwargs)
    assert opt.fallbacks == 0
    return error.value


GOOD: dict[str, Any] = {"x": X, "more": {"a": [A]}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"x": X.double()}, "input x has dtype torch.float64", "optimized for torch.float32"),
    ({"x": X.half()}, "input x has dtype torch.float16", "optimized for torch.float32"),
    ({"x": X[0]}, "input x has rank 1", "optimized for 2"),
    ({"x": X.to("meta")}, "input x has device meta", "optimized for cpu"),
    ({"x": randn(4, 8)}, "input x has size 4 in dimension 0", "dynamic={'x': {0: 'name'}}"),
    ({"x": 3.0}, "input x is float, not a tensor", ""),
    ({"x": None}, "input x is NoneType, not a tensor", ""),
    ({"more": {"a": [A.int()]}}, "input more['a'][0] has dtype torch.int32", "optimized for torch.float32"),
    ({"more": {"a": [A[:2]]}}, "input more['a'][0] has size 2 in dimension 0", "dynamic={"),
    ({"more": {"a": (A,)}}, "input 'more' has another structure", ""),
    ({"more": {"a": [A], "b": A}}, "input 'more' has another structure", ""),
    ({"scale": 3.0}, "'scale' was not captured", "optimize with example inputs for every input"),
    ({"mode": "up"}, "'mode' was not captured", "optimize with example inputs for every input"),
    ({"z": X}, "does not fit the model's forward: got an unexpected keyword argument 'z'", ""),
]


@pytest.mark.parametrize(("change", "what", "way_out"), REFUSED, ids=[row[1] for row in REFUSED])
def test_a_call_that_does_not_fit_is_refused(
    fixed: OptimizedModel, change: dict[str, Any], what: str, way_out: str
) -> None:
    error = refusal(fixed, **{**GOOD, **change})
    assert what in str(error)
    assert way_out in str(error)


def test_a_missing_argument_is_named(fixed: OptimizedModel) -> None:
    assert "'more' is missing" in str(refusal(fixed, X))
    assert "missing a required argument: 'x'" in str(refusal(fixed, more={"a": [A]}))
    assert "too many positional arguments" in str(refusal(fixed, X, 1.0, 2.0, more={"a": [A]}))


def test_another_plain_value_is_refused_with_a_hint(opt: OptimizedModel) -> None:
    for change in ({"scale": 3.0}, {"scale": 2}, {"mode": "down"}):
        call = {"x": X, "scale": 2.0, "more": {"a": [A]}, "mode": "up", **change}
        error = refusal(opt, **call)
        assert f"input {next(iter(change))} is {next(iter(change.values()))!r}" in str(error)
        assert "optimize again with this one" in (error.hint or "")


def test_a_good_call_after_a_refusal_is_good(fixed: OptimizedModel) -> None:
    refusal(fixed, X.double(), more={"a": [A]})
    with torch.no_grad():
        assert same(fixed(**GOOD), MODEL(**GOOD))


def test_the_original_serves_what_does_not_fit_and_is_counted() -> None:
    opt = optimized(X, more={"a": [A]}, on_mismatch="fallback")
    with torch.no_grad():
        assert same(opt(**GOOD), MODEL(**GOOD))
        assert opt.fallbacks == 0
        later = {"x": randn(5, 8), "scale": 3.0}
        assert same(opt(**later), MODEL(**later))
        assert opt.fallbacks == 1
        with pytest.raises(TypeError):
            opt(z=X)
    assert opt.fallbacks == 2
    assert not opt(X[:1], 1.0)["plain"].requires_grad


def test_calls_of_many_threads_are_all_counted() -> None:
    opt = optimized(X, more={"a": [A]}, on_mismatch="fallback")

    def call() -> None:
        for _ in range(100):
            with contextlib.suppress(TypeError):
                opt(z=X)

    often = sys.getswitchinterval()
    threads = [threading.Thread(target=call) for _ in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert opt.fallbacks == 800


def test_it_is_for_inference_only(fixed: OptimizedModel) -> None:
    assert not fixed.training
    assert fixed.eval() is fixed
    with pytest.raises(GraphoptError, match="cannot be trained"):
        fixed.train()


def test_it_does_not_own_the_originals_parameters() -> None:
    opt = optimized(X, on_mismatch="fallback")
    assert list(opt.parameters()) == []


def test_an_empty_batch() -> None:
    model, x = randomised(MLP()), torch.zeros(0, 8)
    opt = graphopt.optimize(model, (x,), executors=("ort", "eager"), effort="fast")
    assert opt(x).shape == (0, 8)


# Checks that are made once


class Flat(nn.Module):
    """Two tensors that must not be mistaken for each other, and plain values."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float = 1.0, more: Any = None) -> torch.Tensor:
        return x - scale * y


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> tuple[OptimizedModel, list[Any]]:
    """Optimized with dynamic rows, and the calls that were checked in full since."""
    dynamic = {"x": {0: "rows"}, "y": {0: "rows"}}
    opt = graphopt.optimize(Flat().eval(), (X, A, 2.0), dynamic=dynamic, executors=("eager",), effort="fast")
    checked: list[Any] = []
    whole = opt._calling._checked
    monkeypatch.setattr(opt._calling, "_checked", lambda *call: checked.append(call) or whole(*call))
    return opt, checked


@pytest.mark.parametrize(
    "spelled",
    [
        lambda x, y: ((x, y, 2.0), {}),
        lambda x, y: ((x, y), {"scale": 2.0}),
        lambda x, y: ((), {"y": y, "scale": 2.0, "x": x}),
        lambda x, y: ((x,), {"more": None, "scale": 2.0, "y": y}),
    ],
    ids=["as captured", "by position", "by name, in another order", "with a default"],
)
def test_every_spelling_is_checked_in_full_once_a_shape(
    flat: tuple[OptimizedModel, list[Any]], spelled: Any
) -> None:
    opt, checked = flat
    for turn in range(6):
        rows = 3 + turn % 2
        x, y = randn(rows, 8, seed=turn), randn(rows, 8, seed=turn + 10)
        args, kwargs = spelled(x, y)
        assert torch.equal(opt(*args, **kwargs), x - 2.0 * y)
    assert len(checked) == 2


def test_one_tensor_in_two_places_says_nothing_of_the_next_call(
    flat: tuple[OptimizedModel, list[Any]],
) -> None:
    opt, _ = flat
    for args, kwargs in (((X,), {"scale": 2.0, "y": X}), ((X,), {"scale": 2.0, "y": A})):
        assert torch.equal(opt(*args, **kwargs), X - 2.0 * kwargs["y"])
    for y in (X, A, X):
        assert torch.equal(opt(X, y, 2.0), X - 2.0 * y)


def test_what_was_remembered_lets_nothing_else_pass(flat: tuple[OptimizedModel, list[Any]]) -> None:
    opt, _ = flat
    for _ in range(2):
        opt(X, A, 2.0)
        opt(X, scale=2.0, y=A)
    for call in ((X, A, 2), (X, A, 3.0), (X, A, True), (X, A[:2], 2.0), (X, A.double(), 2.0), (X, A, 2.0, A)):
        refusal(opt, *call)
        refusal(opt, *call[:1], **dict(zip(("y", "scale", "more"), call[1:], strict=False)))
