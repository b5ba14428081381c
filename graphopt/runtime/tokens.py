"""How many tokens of a call are real: looked up once a call, by whoever asks first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """What a mask says of a batch.

    Args:
        real: how many positions hold a token.
        firsts: how many sequences begin with one that the mask marks with 1.
    """

    real: int
    firsts: int


_counted: ContextVar[dict[int, Tokens] | None] = ContextVar("graphopt_counted_tokens", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """A block in which no mask is written: each is counted once."""
    token = _counted.set({})
    try:
        yield
    finally:
        _counted.reset(token)


def tokens_of(mask: torch.Tensor) -> Tokens:
    """Count what is not zero in a mask. On a GPU this waits for all that is queued, once for both numbers.

    Args:
        mask: (batch, length), or flat, when ``firsts`` means nothing; it outlives the block of ``one_call``.
    """
    counted = _counted.get()
    if counted is None:
        return _count(mask)
    key = id(mask)
    if key not in counted:
        counted[key] = _count(mask)
    return counted[key]


def _count(mask: torch.Tensor) -> Tokens:
    if mask.numel() == 0:
        return Tokens(0, 0)
    real, firsts = torch.count_nonzero(mask), torch.count_nonzero(mask.select(-1, 0) == 1)
    counted = torch.stack((real, firsts)).cpu()
    return Tokens(int(counted[0]), int(counted[1]))
