"""The order of a caller's CUDA stream and the session's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree


@dataclass(frozen=True)
class Origin:
    """Where a request comes from.

    Args:
        stream: the caller's.
        ready: recorded on it when its inputs were queued.
    """

    stream: torch.cuda.Stream
    ready: torch.cuda.Event


def origin(device: torch.device) -> Origin | None:
    """The caller's current stream as it is now; None where there are no streams."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.current_stream(device)
    return Origin(stream, stream.record_event())


def wait_for(origins: Iterable[Origin | None]) -> None:
    """Let the current stream wait for the inputs of requests."""
    for one in origins:
        if one is not None:
            torch.cuda.current_stream(one.stream.device).wait_event(one.ready)


def settled(device: torch.device, origins: Sequence[Origin | None], answers: list[Any]) -> list[Any]:
    """Answers, once they are there; the allocator is told which streams will read them.

    The thread waits for the GPU: an answer is given when it is there. Should the GPU report an error, it is
    every answer: which of them it spoilt is not known.
    """
    if device.type != "cuda":
        return answers
    try:
        torch.cuda.current_stream(device).synchronize()
    except RuntimeError as error:
        return [error] * len(answers)
    for one, results in zip(origins, answers, strict=True):
        for value in pytree.tree_leaves(results):
            if one is not None and isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(one.stream)
    return answers
