"""Ragged batches are what they say, and casting leaves integers alone."""

from __future__ import annotations

import statistics

import pytest
import torch

from graphopt.bench.inputs import dtype_named, fill, moved, padded, real_lengths, uniform_lengths
from graphopt.errors import InputError


def test_lengths_are_log_normal_and_fill_less_than_half() -> None:
    drawn = real_lengths(20000, 512, seed=0)
    assert min(drawn) >= 4
    assert max(drawn) == 512
    assert statistics.median(drawn) == pytest.approx(0.37 * 512, rel=0.03)
    assert 0.42 < fill(drawn, 512) < 0.46
    assert 0.04 < sum(length == 512 for length in drawn) / len(drawn) < 0.06  # 5 % are longer, and cut


def test_one_seed_gives_one_batch_and_its_longest_fills_it() -> None:
    assert real_lengths(8, 128, seed=3) == real_lengths(8, 128, seed=3)
    assert real_lengths(8, 128, seed=3) != real_lengths(8, 128, seed=4)
    for seed in range(20):
        assert max(real_lengths(3, 128, seed)) == 128
    assert real_lengths(1, 2, seed=0) == [2]


def test_uniform_lengths_fill_a_bit_more_than_half() -> None:
    drawn = uniform_lengths(20000, 512, seed=0)
    assert (min(drawn), max(drawn)) == (16, 512)
    assert fill(drawn, 512) == pytest.approx((16 + 512) / 2 / 512, rel=0.02)
    assert uniform_lengths(8, 128, seed=3) == uniform_lengths(8, 128, seed=3)
    assert all(max(uniform_lengths(3, 128, seed)) == 128 for seed in range(20))
    assert uniform_lengths(1, 2, seed=0) == [2]


def test_the_mask_ends_where_the_sentence_does() -> None:
    ids = torch.ones(4, 64, dtype=torch.long)
    kwargs, lengths = padded({"attention_mask": ids.clone(), "scale": 2.0}, "real", 0)
    assert kwargs["attention_mask"].sum(1).tolist() == lengths
    assert kwargs["attention_mask"].dtype == torch.long
    assert kwargs["scale"] == 2.0
    assert bool((kwargs["attention_mask"].diff(dim=1) <= 0).all())  # ones, then zeros
    assert fill(lengths, 64) == pytest.approx(sum(lengths) / 256)


@pytest.mark.parametrize("kwargs", [{}, {"attention_mask": torch.ones(2, 1, 4, 4)}, {"attention_mask": None}])
def test_without_a_mask_nothing_is_padded(kwargs: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--lengths uniform needs an input attention_mask"):
        padded(kwargs, "uniform", 0)


def test_floating_tensors_are_cast_with_their_memory_format() -> None:
    image = torch.randn(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    ids = torch.ones(2, dtype=torch.long)
    cast = moved({"image": image, "ids": ids, "flag": True}, torch.device("cpu"), torch.bfloat16)
    assert cast["image"].dtype == torch.bfloat16
    assert cast["image"].is_contiguous(memory_format=torch.channels_last)
    assert cast["ids"].dtype == torch.long
    assert cast["flag"] is True


def test_dtypes_have_short_names_and_unknown_ones_are_told() -> None:
    assert dtype_named("fp16") is dtype_named("float16") is torch.float16
    with pytest.raises(InputError, match="unknown dtype 'int4'"):
        dtype_named("int4")
