"""Lanes on a GPU: what is queued where, and which stream waits for what; without a GPU, and on one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from graphopt.runtime import scheduler
from graphopt.runtime.scheduling.arrange import with_lanes
from graphopt.runtime.scheduling.streams import Streams
from tests.runtime.scheduling._cuda import Cuda
from tests.runtime.scheduling._plans import diamond


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
