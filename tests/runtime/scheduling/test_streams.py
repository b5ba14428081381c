"""Lanes on a GPU: what is queued where, and which stream waits for what; without a GPU, and on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from graphopt.runtime import scheduler
from graphopt.runtime.scheduling.arrange import with_lanes
from graphopt.runtime.scheduling.streams import Streams
from tests.runtime.scheduling._plans import diamond


class Stream:
    """A stream that notes what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def record_event(self) -> str:
        event = f"e{sum(' records ' in line for line in self._log)}"
        self._log.append(f"{self.name} records {event}")
        return event

    def wait_event(self, event: str) -> None:
        self._log.append(f"{self.name} waits for {event}")

    def wait_stream(self, stream: Stream) -> None:
        self._log.append(f"{self.name} waits for {stream.name}")


class Cuda:
    """What is used of ``torch.cuda``."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.on = "caller"
        self.made = 0

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802
        self.made += 1
        return Stream(f"s{self.made}", self.log)

    def current_stream(self, device: torch.device) -> Stream:
        return Stream("caller", self.log)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.on = stream.name
        yield
        self.on = "caller"


def test_a_step_waits_for_the_steps_of_other_streams_that_it_reads_from() -> None:
    cuda = Cuda()

    def noted(name: str, factor: float) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            cuda.log.append(f"{name} on {cuda.on}")
            return factor * x

        return run

    made = dataclasses.replace(diamond(noted("left", 2.0), noted("right", 3.0)), lanes=(0, 0, 1, 0))
    end, left = Streams(made, cuda).run([torch.ones(4)])
    assert torch.equal(end, torch.full((4,), -2.0))
    assert torch.equal(left, torch.full((4,), 4.0))
    assert cuda.log == [
        "caller records e0",
        "s1 waits for e0",  # what the caller's stream holds
        "caller records e1",  # top
        "left on caller",
        "s1 waits for e1",
        "right on s1",
        "s1 records e2",
        "caller waits for e2",  # end
        "caller waits for s1",
    ]


def test_the_callers_stream_waits_for_what_was_queued_before_a_failure() -> None:
    cuda = Cuda()
    made = dataclasses.replace(diamond(lambda x: x, lambda x: x.view(3)), lanes=(0, 0, 1, 0))
    with pytest.raises(RuntimeError, match="invalid for input"):
        Streams(made, cuda).run([torch.ones(4)])
    assert cuda.log[-1] == "caller waits for s1"


@pytest.mark.gpu
def test_on_a_gpu_the_answer_is_the_same() -> None:
    device = torch.device("cuda")
    made = diamond(lambda x: (x @ x).cos(), lambda x: (x @ x).sin(), device)
    x = torch.randn(512, 512, device=device)
    expected = scheduler.run(made, [x])
    beside = with_lanes(made, (0, 0, 1, 0), 2)
    for _ in range(20):
        for found, want in zip(scheduler.run(beside, [x]), expected, strict=True):
            assert torch.equal(found, want)
