"""A session on a program that costs nothing, for what threads, queues and futures do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.runtime.serving.batcher import Batcher
from graphopt.runtime.serving.layout import Layout
from graphopt.runtime.serving.session import Face, Manners, Session

Program = Callable[[list[torch.Tensor]], Sequence[Any]]

# One input (batch, length), one output likewise.
LAYOUT = Layout(
    rows=(0,),
    lengths=({1: 0},),
    results=((0, {1: 0}),),
    names=("seq",),
    edges=((4, 8, 16),),
    fills=(0,),
)


class Gate:
    """A program that waits until it is let go, to fill a queue behind it.

    Attributes:
        calls: the shapes that it was called with.
    """

    def __init__(self, program: Program | None = None) -> None:
        self._program = program or doubled
        self.entered, self.open = threading.Event(), threading.Event()
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, tensors: list[torch.Tensor]) -> Sequence[Any]:
        self.calls.append(tuple(tensors[0].shape))
        self.entered.set()
        assert self.open.wait(30)
        return self._program(tensors)


def doubled(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Twice the input; a negative number in it is an error."""
    (x,) = tensors
    if (x < 0).any():
        raise ValueError("a negative number")
    return [2 * x]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [args[0]]


def session(
    program: Program = doubled,
    *,
    max_batch: int = 8,
    max_wait_ms: float = 0.0,
    queue_size: int = 64,
    verify: int = 0,
    layout: Layout | str = LAYOUT,
    **manners: Any,
) -> Session:
    batcher = Batcher(program, layout, lambda tensors: None, floor_ulps=8, verify=verify, max_batch=max_batch)
    face = Face(_first, lambda outputs: outputs[0], torch.device("cpu"))
    return Session(batcher, face, max_wait_ms=max_wait_ms, queue_size=queue_size, manners=Manners(**manners))


def numbers(*values: float) -> torch.Tensor:
    """A request of one row."""
    return torch.tensor([values])
