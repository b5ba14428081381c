"""CUDA graphs without a GPU: a graph that calls its function, and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from graphopt.runtime import graphed


class StandInGraph:
    """A graph by its function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.replays = 0

    def replay(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        self.replays += 1
        return list(self.function(*inputs))


class StandIn:
    """What ``CudaGraphs`` does, without a GPU.

    Attributes:
        made: every graph captured, in order.
        dropped: every graph released.
        failing: the error that the next capture raises.
    """

    last: StandIn

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: list[StandInGraph] = []
        self.dropped: list[StandInGraph] = []
        self.failing: Exception | None = None
        StandIn.last = self

    def here(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def follow(self) -> None:
        pass

    def capture(
        self, function: Callable[..., Any], inputs: Sequence[torch.Tensor], during: Any
    ) -> StandInGraph:
        if self.failing is not None:
            raise self.failing
        with during:
            function(*inputs)
        self.made.append(StandInGraph(function))
        return self.made[-1]

    def drop(self, graph: StandInGraph) -> None:
        self.dropped.append(graph)

    def bytes(self) -> int:
        return 1000 * (len(self.made) - len(self.dropped))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Programs made inside use the stand-in."""
    monkeypatch.setattr(graphed, "CudaGraphs", StandIn)
    return StandIn
