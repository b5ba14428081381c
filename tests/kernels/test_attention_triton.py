"""Attention in Triton at the edges of its blocks: fewer keys than a step takes, and masks that end early."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from graphopt.ir.op import OPS, Sample
from graphopt.kernels import _attention_triton
from graphopt.kernels._attention_configs import blocks, tail
from graphopt.kernels._tuning import Config
from tests.kernels._faces import DEVICE, MARKS, assert_fences_hold, launched
from tests.kernels.test_ops import assert_right, cast, mapped

pytestmark = MARKS
OP = OPS["attention"]


def drawn(S: int, T: int, mask: torch.Tensor | None = None, **options: object) -> Sample:
    heads = (torch.randn(2, length, 2, 16) for length in (S, T, T))
    sample = cast(Sample((*heads, mask), options), torch.float16)
    return mapped(sample, lambda x: x.to(DEVICE))


def cut(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    """Have so many keys taken in a step, and the last one that a mask allows looked for."""
    config = Config({"BLOCK_S": 16, "BLOCK_T": keys}, 4, 2)
    monkeypatch.setattr(_attention_triton, "choose", lambda *_: config)
    monkeypatch.setattr(_attention_triton, "MANY_KEYS", 1)


@pytest.mark.parametrize(
    ("T", "block", "keys"), [(197, 64, 16), (197, 128, 128), (128, 64, 64), (90, 64, 32), (5, 32, 16)]
)
def test_the_last_step_is_as_long_as_what_is_left(T: int, block: int, keys: int) -> None:
    assert tail(T, block, is_causal=False) == keys
    assert tail(T, block, is_causal=True) == block


@pytest.mark.parametrize("T", [5, 32, 37, 64, 90])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [32, 64])
def test_every_number_of_keys(keys: int, is_causal: bool, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, keys)
    sample = drawn(19, T, is_causal=is_causal)
    assert_right(OP, sample, launched(OP, sample))
    assert_fences_hold(OP, drawn(19, T, is_causal=is_causal), monkeypatch)


ENDS = itertools.product((0, 1, 32, 33, 64, 90), (None, -math.inf, -1e4))


@pytest.mark.parametrize(("seen", "fill"), [end for end in ENDS if end != (0, -math.inf)])  # which is NaN
def test_a_mask_that_ends_early(seen: int, fill: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 32)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    mask[0, ..., seen:] = mask[1, ..., 3] = False
    sample = drawn(19, 90, mask, fill=fill)
    assert_right(OP, sample, launched(OP, sample))


def test_keys_behind_the_end_of_a_mask_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 32)
    mask = torch.arange(90).expand(2, 1, 1, 90) < 33
    sample = drawn(19, 90, mask)
    before = launched(OP, sample)[0]
    for x in sample.args[1:3]:
        x[:, 64:] = math.nan
    assert torch.equal(launched(OP, sample)[0], before)


@pytest.mark.parametrize("T", [128, 197, 512])
def test_the_tiles_offered_fit(T: int) -> None:
    found = blocks(12, T, T, 64, 2, 132, 227 * 1024)
    assert 1 <= len(found) <= 10
    assert len({str(config) for config in found}) == len(found)
