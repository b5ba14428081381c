"""A program of CUDA graphs: what is captured when, and what serves everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graphopt.runtime import graphed as module
from graphopt.runtime.graphed import Graphed
from tests._models import randn
from tests.runtime._graphs import StandIn, stand_in

__all__ = ["stand_in"]
CPU = torch.device("cpu")


class Work:
    """Doubles its input; counts how often a shape was prepared."""

    def __init__(self) -> None:
        self.prepared: list[tuple[int, ...]] = []

    def prepare(self, inputs: Sequence[torch.Tensor], *sizes: int) -> Any:
        self.prepared.append((*inputs[0].shape, *sizes))
        return lambda x: (x * 2, x)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def program(work: Work, stand_in: type[StandIn]) -> Graphed:
    return Graphed(CPU, work.prepare)


def test_the_first_shape_is_captured_at_once_and_others_when_they_come_again(program: Graphed) -> None:
    program.run([randn(3)])
    assert len(StandIn.last.made) == 1
    program.run([randn(4)])
    assert len(StandIn.last.made) == 1
    program.run([randn(4)])
    assert len(StandIn.last.made) == 2
    program.run([randn(3)])
    assert [graph.replays for graph in StandIn.last.made] == [2, 1]


def test_a_shape_is_prepared_once(program: Graphed, work: Work) -> None:
    for size in (3, 4, 3, 5, 4, 5, 5):
        (double, _) = program.run([torch.ones(size)])
        assert torch.equal(double, torch.full((size,), 2.0))
    assert work.prepared == [(3,), (4,), (5,)]


def test_the_least_recently_used_graph_is_released(program: Graphed, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in range(1, module.GRAPHS + 2):
        program.run([torch.ones(size)])
        program.run([torch.ones(size)])
    assert StandIn.last.dropped == StandIn.last.made[:1]
    assert program.describe() == {
        "cuda_graphs": module.GRAPHS,
        "cuda_graphs_dropped": 1,
        "cuda_graph_bytes": 1000 * module.GRAPHS,
    }


def test_sizes_besides_the_shapes_have_graphs_of_their_own(work: Work, stand_in: type[StandIn]) -> None:
    program = Graphed(CPU, work.prepare, limit=2)
    x = torch.ones(3)
    for size in (64, 128, 64, 128, 192, 192, 64):
        program.run([x], (size,))
    assert work.prepared == [(3, 64), (3, 128), (3, 192)]
    assert [graph.replays for graph in StandIn.last.made] == [2, 1, 1]
    assert StandIn.last.dropped == StandIn.last.made[:1]
    assert program.sizes == [(128,), (192,)]
    program.function([x], (192,))
    assert len(work.prepared) == 3


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), AssertionError("no")]
)
def test_what_cannot_be_captured_runs_without_a_graph_and_says_so(program: Graphed, error: Exception) -> None:
    StandIn.last.failing = error
    for _ in range(3):
        (double, _) = program.run([torch.ones(2)])
        assert torch.equal(double, torch.full((2,), 2.0))
    assert not program.captured
    assert str(error) in str(program.failure)
    assert program.describe()["cuda_graph_bytes"] == 0


def test_a_result_never_shares_memory_with_an_input(program: Graphed) -> None:
    program.run([torch.ones(2)])
    x = torch.ones(5)  # a new shape, without a graph
    _, same = program.run([x])
    same.zero_()
    assert torch.equal(x, torch.ones(5))


def test_functions_of_many_shapes_are_forgotten(program: Graphed, work: Work) -> None:
    for size in range(module._FUNCTIONS + 2):
        program.run([torch.ones(size)])
    program.run([torch.ones(0)])  # the first one: its graph is there, its function is not needed
    program.run([torch.ones(1)])
    assert work.prepared[-1] == (1,)
    assert work.prepared.count((1,)) == 2
    assert work.prepared.count((0,)) == 1
