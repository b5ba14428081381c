"""What changes from call to call: sizes that vary are one less in every other call that is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture.export import capture_any
from graphopt.runtime import candidates as module
from graphopt.runtime.changing import changing
from graphopt.runtime.target import Target
from tests._models import MLP, randn, randomised

CPU, GPU = Target(torch.device("cpu")), Target(torch.device("cuda"))


class Masked(nn.Module):
    """A mean of rows that a mask picks, and a table that is read at given places."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        found = self.table(ids)
        mean = (found * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return mean + found.gather(1, last.view(-1, 1, 1).expand(-1, 1, 4))[:, 0]


def masked(seq: int = 6, last: int = 2) -> tuple[Any, list[torch.Tensor]]:
    ids, mask = torch.arange(2 * seq).view(2, seq), torch.ones(2, seq, dtype=torch.long)
    mask[1, 3:] = 0
    given = (ids, mask, torch.full((2,), last))
    dynamic = {"ids": {1: "seq"}, "mask": {1: "seq"}}
    return capture_any(randomised(Masked()), given, None, dynamic=dynamic)


def shapes(turn: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in turn]


def test_a_size_that_varies_is_one_less_in_every_input_that_has_it() -> None:
    graph, inputs = masked()
    first, other = changing(graph, inputs, CPU)
    assert first is inputs
    assert shapes(other) == [(2, 5), (2, 5), (2,)]
    assert all(tensor.is_contiguous() for tensor in other)
    assert torch.equal(other[0], inputs[0][:, :5])
    assert other[2] is inputs[2]


def test_the_longest_sequence_has_one_token_less() -> None:
    graph, inputs = capture_any(randomised(Masked()), tuple(masked()[1]), None)
    _, other = changing(graph, inputs, CPU, "mask")
    assert torch.equal(other[1], torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]))
    assert bool(inputs[1][0].all())


@pytest.mark.parametrize(("batch", "sizes"), [(2, [2]), (3, [3, 2])])
def test_no_size_gets_too_small(batch: int, sizes: list[int]) -> None:
    graph, inputs = capture_any(randomised(MLP()), (randn(batch, 8),), None, dynamic={"x": {0: "batch"}})
    assert [turn[0].shape[0] for turn in changing(graph, inputs, CPU)] == sizes


def test_sizes_that_do_not_vary_and_those_on_a_gpu_stay() -> None:
    graph, inputs = capture_any(randomised(MLP()), (randn(4, 8),), None)
    assert changing(graph, inputs, CPU) == [inputs]
    graph, inputs = masked()
    assert changing(graph, inputs, GPU) == [inputs]


def test_values_that_point_behind_the_end_keep_the_examples_alone() -> None:
    graph, inputs = masked(last=5)
    assert changing(graph, inputs, CPU) == [inputs]


def test_candidates_are_timed_on_sizes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = module.scheduler.run

    def watched(plan: Any, inputs: Sequence[torch.Tensor]) -> Any:
        seen.append(inputs[0].shape[0])
        return run(plan, inputs)

    monkeypatch.setattr(module.scheduler, "run", watched)
    opt = graphopt.optimize(randomised(MLP()), (randn(5, 8),), dynamic={"x": {0: "batch"}})
    assert min(seen.count(5), seen.count(4)) > 20
    assert opt(randn(9, 8)).shape[0] == 9
