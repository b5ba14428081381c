"""Real tokens of a mask: the right numbers, and looked up once a call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphopt.runtime import tokens
from graphopt.runtime.tokens import Tokens, one_call, tokens_of

HOLES = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
MASKS: dict[str, Callable[[], torch.Tensor]] = {
    "int64": lambda: HOLES,
    "bool": HOLES.bool,
    "strided": lambda: HOLES.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("kind", MASKS)
def test_tokens_and_sequences_that_begin_with_one_are_counted(kind: str) -> None:
    assert tokens_of(MASKS[kind]()) == Tokens(8, 2)


def test_weights_tell_tokens_too_but_mark_none_with_1() -> None:
    assert tokens_of(HOLES * torch.tensor([[0.5], [-2.0], [3.0]])) == Tokens(8, 0)


def test_nothing_has_no_tokens() -> None:
    for size in ((0, 4), (3, 0)):
        assert tokens_of(torch.ones(size)) == Tokens(0, 0)
    assert tokens_of(torch.zeros(3, 4)) == Tokens(0, 0)
    assert tokens_of(HOLES.flatten()).real == 8


def test_a_mask_is_counted_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    real = tokens._count
    monkeypatch.setattr(tokens, "_count", lambda mask: counted.append(mask) or real(mask))
    mask, other = HOLES.clone(), HOLES[:2]
    with one_call():
        assert [tokens_of(x).real for x in (mask, other, mask, other)] == [8, 4, 8, 4]
        assert len(counted) == 2
    mask.zero_()  # between two calls it may change
    with one_call():
        assert tokens_of(mask).real == 0
    assert tokens_of(mask).real == 0
    assert len(counted) == 4
