"""Attention of packed sequences in Triton: sequences longer than a tile, empty ones, tokens in none."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from graphopt.ir.op import OPS, Sample
from graphopt.kernels import _attention_triton
from graphopt.kernels._tuning import Config
from tests.kernels._faces import DEVICE, MARKS, assert_fences_hold, launched
from tests.kernels.test_ops import assert_right, cast, mapped

pytestmark = MARKS
OP = OPS["packed_attention"]
over_causal = pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
TILES = [(16, 16), (16, 32), (32, 16)]  # queries and keys of a step

# Tokens, and where sequences begin and the last one ends.
LAYOUTS: dict[str, tuple[int, list[int]]] = {
    "one over several tiles": (50, [0, 50]),
    "as long as a tile, and one more and less": (63, [0, 16, 33, 48, 63]),
    "empty first, between and last": (22, [0, 0, 3, 3, 22, 22]),
    "tokens in front and behind": (70, [9, 26, 41]),
    "more outside than the longest has programs": (90, [40, 42]),
    "single tokens": (5, [0, 1, 2, 3, 4, 5]),
}
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)
over_tiles = pytest.mark.parametrize("tiles", TILES, ids="{0[0]}x{0[1]}".format, indirect=True)


@pytest.fixture(autouse=True)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that few tokens are several of them."""
    queries, keys = getattr(request, "param", (16, 32))
    config = Config({"BLOCK_S": queries, "BLOCK_T": keys}, 1, 1)
    monkeypatch.setattr(_attention_triton, "choose", lambda *_: config)


def drawn(
    tokens: int, ends: list[int], dtype: torch.dtype, heads: int = 2, d: int = 16, e: int = 16, **kwargs: Any
) -> Sample:
    """Twice as many query heads as key heads; ``longest`` is what the longest sequence has."""
    sizes = (tokens, heads, d), (tokens, heads // 2, d), (tokens, heads // 2, e)
    longest = max((end - begin for begin, end in pairwise(ends)), default=0)
    offsets = torch.tensor(ends, dtype=torch.int32)
    sample = Sample((*(torch.randn(size) for size in sizes), offsets, longest), kwargs)
    return mapped(cast(sample, dtype), lambda x: x.to(DEVICE))


def attended(*args: Any, **kwargs: Any) -> torch.Tensor:
    (out,) = launched(OP, Sample(args, kwargs))
    return out


def outside(tokens: int, ends: list[int]) -> torch.Tensor:
    place = torch.arange(tokens, device=DEVICE)
    return (place < ends[0]) | (place >= ends[-1])


@over_layouts
@over_tiles
@pytest.mark.parametrize(
    ("dtype", "is_causal"),
    [(torch.float16, False), (torch.bfloat16, True)],
    ids=["float16", "bfloat16 causal"],
)
def test_every_layout_is_right(layout: str, dtype: torch.dtype, is_causal: bool) -> None:
    sample = drawn(*LAYOUTS[layout], dtype, is_causal=is_causal)
    (found,) = launched(OP, sample)
    assert_right(OP, sample, [found])
    assert not found[outside(*LAYOUTS[layout])].any()
    assert torch.equal(found, launched(OP, sample)[0])


@over_causal
@pytest.mark.parametrize(("d", "e"), [(1, 1), (24, 40), (33, 7)])
def test_odd_numbers_of_features_are_right(d: int, e: int, is_causal: bool) -> None:
    sample = drawn(38, [1, 20, 37], torch.float16, d=d, e=e, is_causal=is_causal, scale=0.4)
    assert_right(OP, sample, launched(OP, sample))


@over_layouts
def test_nothing_outside_of_a_buffer_is_read_or_written(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets stand between ones here, which must not be taken for a sequence's."""
    (found,) = assert_fences_hold(OP, drawn(*LAYOUTS[layout], torch.float16), monkeypatch)
    assert not found[outside(*LAYOUTS[layout])].any()


@over_causal
@over_tiles
def test_other_sequences_and_tokens_of_none_are_not_seen(is_causal: bool) -> None:
    """NaN in all of them changes no bit of a sequence, which is also what it is alone."""
    ends = [3, 25, 25, 44]
    query, key, value, offsets, longest = drawn(49, ends, torch.float16).args
    whole = attended(query, key, value, offsets, longest, is_causal)
    for begin, end in pairwise(ends):
        spoilt = [torch.full_like(x, math.nan) for x in (query, key, value)]
        for x, clean in zip(spoilt, (query, key, value), strict=True):
            x[begin:end] = clean[begin:end]
        assert torch.equal(attended(*spoilt, offsets, longest, is_causal)[begin:end], whole[begin:end])
        own = offsets.new_tensor([0, end - begin])
        alone = (x[begin:end] for x in (query, key, value))
        assert torch.equal(attended(*alone, own, end - begin, is_causal), whole[begin:end])


def test_sequences_without_any_token_give_zeros() -> None:
    for ends in ([4], [0], [2, 2], [0, 0, 0], [7, 7, 7]):
        query, key, value, offsets, longest = drawn(7, ends, torch.float16).args
        found = attended(query, key, value, offsets, longest)
        assert torch.equal(found, torch.zeros_like(found))
    assert attended(*drawn(0, [0, 0], torch.float16).args).shape == (0, 2, 16)


@over_causal
def test_a_longest_that_is_too_much_changes_nothing(is_causal: bool) -> None:
    """It is a bound: a bucket's, say."""
    *given, longest = drawn(50, [0, 7, 41], torch.bfloat16).args
    assert torch.equal(attended(*given, 64, is_causal), attended(*given, longest, is_causal))


@over_causal
def test_a_sequence_ends_with_the_tokens_at_the_latest(is_causal: bool) -> None:
    query, key, value, offsets, _ = drawn(40, [0, 7, 40, 40], torch.float16).args
    further = offsets.new_tensor([0, 7, 90, 95])
    expected = attended(query, key, value, offsets, 33, is_causal)
    assert torch.equal(attended(query, key, value, further, 83, is_causal), expected)


def test_parts_of_one_projection_are_read_where_they_are() -> None:
    *_, offsets, longest = drawn(40, [0, 7, 39], torch.float16).args
    packed = torch.randn(40, 3, 2, 16).to(DEVICE, torch.float16)
    query, key, value = packed.unbind(1)
    assert query.stride() == (96, 16, 1)
    apart = (x.contiguous() for x in (query, key, value))
    expected = attended(*apart, offsets, longest)
    assert torch.equal(attended(query, key, value, offsets, longest), expected)


def test_scores_beyond_every_exponent_choose_one_key() -> None:
    """Scores up to 1e5, tile after tile a higher maximum: weights are 0 and 1, never NaN."""
    tokens = 48
    ramp = torch.arange(1, tokens + 1.0)[:, None, None] * torch.ones(16)
    query, key = torch.full((tokens, 2, 16), 130.0), ramp[:, :1]
    value = torch.randn(tokens, 1, 16)
    given = [x.to(DEVICE, torch.float16) for x in (query, key, value)]
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    found = attended(*given, offsets, tokens, scale=1.0)
    assert torch.equal(found, given[2][-1:].expand_as(found))
    causal = attended(*given, offsets, tokens, True, 1.0)
    assert torch.equal(causal, given[2].expand_as(causal))
