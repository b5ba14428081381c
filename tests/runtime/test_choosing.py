"""Which implementation is chosen: by a clock that the test holds, among those that are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.ir.graph import Graph
from graphopt.runtime import choosing
from graphopt.runtime.choosing import Choosing
from graphopt.runtime.implementations import Implementation, implementations
from tests._models import randn, randomised

Run = Callable[..., Any]


class Clock:
    """A timer that says what it was told, by the order of the thunks; each runs once."""

    def __init__(self, *us: float) -> None:
        self.us = us
        self.asked = 0

    def __call__(self, thunks: Sequence[Callable[[], Any]]) -> list[float]:
        self.asked += 1
        for thunk in thunks:
            thunk()
        return list(self.us[: len(thunks)])


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


X = randn(5, 6)


def graph_of(model: nn.Module) -> Graph:
    return capture(randomised(model), (X,))


def exact(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    return (x.double() @ weight.double().T + bias.double()).to(x.dtype)


def wrong(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    return nn.functional.linear(x, weight, bias) + 1e-2


def broken(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    raise RuntimeError("out of registers\nand more")


def offer(monkeypatch: pytest.MonkeyPatch, **others: Run) -> None:
    """Let linears have these implementations before ATen's."""

    def ways(target: Any, args: Any, kwargs: Any) -> Any:
        found, refused = implementations(target, args, kwargs)
        if "linear" in str(target):
            found, refused = [*(Implementation(name, run) for name, run in others.items()), found[-1]], {}
        return found, refused

    monkeypatch.setattr(choosing, "implementations", ways)


def decisions(graph: Graph, choose: Choosing) -> list[choosing.Decision]:
    """Run a graph node by node, deciding for every linear."""
    values: dict[Any, Any] = {graph.placeholders[0]: X}
    with torch.no_grad():
        for node in graph.calls:
            args = torch.fx.map_arg(node.args, lambda n: values[n] if n in values else graph.constant(n))
            decision = choose.decide(node, args, {})
            values[node] = decision.chosen.run(*args)
    return [row for row in choose.decisions if row.op == "aten.linear"]


def test_the_fastest_is_chosen_once_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, exact=exact)
    graph, clock = graph_of(Linears()), Clock(3.0, 5.0)
    same, last = decisions(graph, Choosing(graph, timed=True, timer=clock))
    assert same.chosen.name == last.chosen.name == "exact"
    assert same.us == {"exact": 3.0, "aten": 5.0}
    assert len(same.nodes) == 2
    assert clock.asked == 2
    assert same.reason == "aten.linear 5x6 6x6 6 x2 runs on exact: exact 3.0 us; aten 5.0 us"


def test_aten_is_chosen_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, exact=exact)
    graph = graph_of(Linears())
    found = decisions(graph, Choosing(graph, timed=True, timer=Clock(5.0, 3.0)))
    assert {row.chosen.name for row in found} == {"aten"}


def test_what_is_wrong_or_fails_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, wrong=wrong, broken=broken)
    graph, clock = graph_of(Linears()), Clock()
    first, _ = decisions(graph, Choosing(graph, timed=True, timer=clock))
    assert first.chosen.name == "aten"
    assert "exceeds" in first.refused["wrong"]
    assert first.refused["broken"] == "RuntimeError: out of registers"
    assert clock.asked == 0  # one is left: there is nothing to time
    assert first.to_dict()["refused"] == first.refused


def test_without_timing_the_preferred_one_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, wrong=wrong, exact=exact)
    graph, clock = graph_of(Linears()), Clock()
    found = decisions(graph, Choosing(graph, timed=False, timer=clock))
    assert [row.chosen.name for row in found] == ["exact", "exact"]
    assert clock.asked == 0


def test_other_sizes_take_what_was_measured_for_the_same_op(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, exact=exact)
    graph, clock = graph_of(Linears()), Clock(9.0, 1.0)
    choose = Choosing(graph, timed=True, timer=clock)
    decisions(graph, choose)
    choose.settle()
    node = next(node for node in graph.calls if "linear" in str(node.target))
    weight, bias = (graph.constant(argument) for argument in node.args[1:3])
    later = choose.decide(node, (randn(17, 6), weight, bias), {})
    assert later.chosen.name == "aten"
    assert later.us == {}
    assert clock.asked == 2


def test_a_later_shape_takes_what_was_measured_at_the_most_similar_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One op at two sizes of weights, each with a winner of its own: the rows that vary decide nothing."""
    offer(monkeypatch, exact=exact)
    graph = graph_of(Linears())
    times = iter([(9.0, 1.0), (1.0, 9.0)])
    choose = Choosing(graph, timed=True, timer=lambda thunks: list(next(times)))
    square, narrow = decisions(graph, choose)
    assert (square.chosen.name, narrow.chosen.name) == ("aten", "exact")
    choose.settle()
    found = {}
    for node in graph.calls:
        if "linear" in str(node.target):
            weight, bias = (graph.constant(argument) for argument in node.args[1:3])
            found[tuple(weight.shape)] = choose.decide(node, (randn(6, 6), weight, bias), {}).chosen.name
    assert found == {(6, 6): "aten", (4, 6): "exact"}


def test_a_later_shape_is_compared_until_one_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of them at a user's call: the likeliest alone, while it is right."""
    ran: list[str] = []

    def told(name: str, run: Run) -> Run:
        def noted(*args: Any) -> Any:
            ran.append(name)
            return run(*args)

        return noted

    offer(monkeypatch, one=told("one", exact), two=told("two", exact))
    graph = graph_of(Linears())
    choose = Choosing(graph, timed=True, timer=Clock(9.0, 1.0, 5.0))
    decisions(graph, choose)
    choose.settle()
    node = next(node for node in graph.calls if "linear" in str(node.target))
    weight, bias = (graph.constant(argument) for argument in node.args[1:3])
    ran.clear()
    assert choose.decide(node, (randn(17, 6), weight, bias), {}).chosen.name == "two"
    assert ran == ["two"]
    offer(monkeypatch, one=told("one", exact), two=told("two", wrong))
    ran.clear()
    later = choose.decide(node, (randn(18, 6), weight, bias), {})
    assert later.chosen.name == "one"
    assert ran == ["two", "one"]
    assert "exceeds" in later.refused["two"]


def test_short_memory_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        return exact(x, weight, bias)

    def short(thunks: Any) -> list[float]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    offer(monkeypatch, full=full)
    graph = graph_of(Linears())
    first, _ = decisions(graph, Choosing(graph, timed=True, timer=short))
    assert "memory is too short" in first.reason


def test_empty_tensors_have_one_implementation() -> None:
    linear = torch.ops.aten.linear.default
    ways, refused = implementations(linear, (torch.empty(0, 6), randn(4, 6)), {})
    assert [way.name for way in ways] == ["aten"]
    assert refused == {}


def test_copies_of_weights_are_as_many_as_the_cache_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(Linears())
    node = next(node for node in graph.calls if "linear" in str(node.target))
    weight, bias = (graph.constant(argument) for argument in node.args[1:3])
    monkeypatch.setattr(choosing, "l2_bytes", lambda device: 10 * (36 + 6) * 4)
    copies = choosing._copies(node, (X, weight, bias))
    assert len(copies) == 20
    assert all(copy[0] is X for copy in copies)
    assert len({copy[1].data_ptr() for copy in copies}) == 20
    assert all(torch.equal(copy[1], weight) for copy in copies)


def test_a_kernel_that_fails_later_hands_over_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails_on_its_third_call(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        calls.append(x)
        if len(calls) >= 3:
            raise RuntimeError("misaligned address in the compiler")
        return exact(x, weight, bias)

    offer(monkeypatch, brittle=fails_on_its_third_call)
    graph = graph_of(Linears())
    choose = Choosing(graph, timed=False)
    node = next(node for node in graph.calls if "linear" in str(node.target))
    weight, bias = (graph.constant(argument) for argument in node.args[1:3])
    decision = choose.decide(node, (X, weight, bias), {})
    assert decision.chosen.name == "brittle"
    results = [decision.run(X, weight, bias) for _ in range(3)]
    torch.testing.assert_close(results[0], results[2])
    assert decision.chosen.name == "aten"
    assert decision.refused["brittle"] == "RuntimeError: misaligned address in the compiler"
    assert len(calls) == 3


def test_atens_own_failure_is_raised() -> None:
    graph = graph_of(Linears())
    node = next(node for node in graph.calls if "linear" in str(node.target))
    weight, bias = (graph.constant(argument) for argument in node.args[1:3])
    decision = Choosing(graph, timed=False).decide(node, (X, weight, bias), {})
    decision.chosen = decision.last
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        decision.run(randn(3, 5), weight, bias)
