"""Gated MLPs of experts in Triton: rows shared out in every way, over more tiles than the samples have."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.ir.op import OPS, Sample
from graphopt.kernels import _triton, grouped_gated_mlp
from graphopt.kernels._linear_configs import Chip, gated_configs, grouped_configs
from graphopt.kernels._triton import Gpu, recorded_launches, standing_in_for
from graphopt.kernels._tuning import Config
from tests.kernels._faces import DEVICE, MARKS, assert_fences_hold, fenced, fenced_allocations, launched
from tests.kernels.test_ops import assert_right, mapped

OP = OPS["grouped_gated_mlp"]
SMALL = Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 3}, 4, 2)
H100 = Gpu((9, 0), 132, 227 * 1024)

pytestmark = MARKS


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows and columns, whatever would be chosen."""
    monkeypatch.setattr(grouped_gated_mlp, "choose", lambda *_: SMALL)


def sample(rows: int, ends: list[int], inner: int = 20) -> Sample:
    x, weight = torch.randn(rows, 24), torch.randn(len(ends), 24, 2 * inner) / 24**0.5
    given = x.half().to(DEVICE), weight.half().to(DEVICE), torch.tensor(ends, device=DEVICE)
    return Sample((*given, "gelu_tanh", True))


SHARES = [
    [21, 21, 55, 56, 61],  # several tiles, and a lower last one
    [0, 0, 32, 32, 60],  # the first experts have no rows, nor has one in the middle
    [16, 32, 48, 61, 61],  # whole tiles, and none for the last expert
    [0, 0, 0, 0, 0],  # nobody has rows
    [0, 0, 0, 0, 61],
    [1, 2, 3, 4, 5],  # most rows have no expert
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("ends", SHARES, ids=str)
def test_rows_over_several_tiles(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is right, those without an expert are zeros, and nothing beside them is touched."""
    given = sample(61, ends)
    (out,) = assert_fences_hold(OP, given, monkeypatch)
    assert_right(OP, given, [out])
    assert not out[ends[-1] :].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("ends", [[60, 30, 80], [-5, 40, 20], [10, 200, 2**40]], ids=str)
def test_wrong_ends_lead_out_of_no_buffer(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What they give nobody says; what lies around the rows is neither read nor written."""
    given = mapped(sample(70, ends), lambda x: fenced(x, math.nan if x.is_floating_point() else 1)[1])
    with fenced_allocations(monkeypatch):
        (out,) = launched(OP, given)
    assert out.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_the_rows_of_many_experts() -> None:
    shares = random.Random(0)
    counts = [shares.choice([0, 0, 1, 5, 16, 17, 40]) for _ in range(41)]
    ends = list(itertools.accumulate(counts))
    given = sample(ends[-1] + 3, ends, inner=16)
    assert_right(OP, given, launched(OP, given))


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_each_expert_over_several_tiles() -> None:
    x, weight = torch.randn(3, 37, 40), torch.randn(3, 48, 40).mT / 40**0.5
    given = mapped(Sample((x.half(), weight.half(), None, "silu")), lambda v: v.to(DEVICE))
    assert_right(OP, given, launched(OP, given))


@pytest.mark.parametrize(
    "given", [sample(1, [1]), sample(1, [0]), sample(5, [5], inner=1), sample(2, [1, 2])]
)
def test_one_of_everything(given: Sample) -> None:
    """Sizes of 1 are known when the kernel is compiled."""
    assert_right(OP, given, launched(OP, given))


def test_experts_that_are_none_leave_zeros() -> None:
    x, weight = torch.ones(5, 12, device=DEVICE).half(), torch.ones(0, 12, 8, device=DEVICE).half()
    (out,) = launched(OP, Sample((x, weight, torch.zeros(0, dtype=torch.int32, device=DEVICE))))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.usefixtures("small_tiles")
def test_the_launch_depends_on_no_value_of_ends() -> None:
    """So that a CUDA graph serves every routing; fake tensors have no values."""
    with FakeTensorMode(), recorded_launches() as launches:
        x, weight = torch.empty(50, 40).half(), torch.empty(8, 40, 48).half()
        assert OP.triton is not None
        OP.triton.launch(x, weight, torch.empty(8, dtype=torch.int64))
        OP.triton.launch(x[:2], weight, torch.empty(8, dtype=torch.int64))
    # 50 rows in 9 groups are 11 tiles of 16 rows at most, 2 rows are 2; there are 2 tiles of columns.
    assert [launch.grid for launch in launches] == [(22,), (4,)]


def test_tiles_for_an_experts_share_of_the_rows() -> None:
    chip = Chip(H100.processors, H100.shared_memory)
    few, many = (grouped_configs(rows, 8, 2, chip) for rows in (8, 8192))
    assert few[0] == gated_configs(2, 2, chip)[0]
    assert many[0] == gated_configs(2048, 2, chip)[0]
    between = grouped_configs(8 * 20, 8, 2, chip)
    assert between[0] == gated_configs(40, 2, chip)[0]
    assert gated_configs(20, 2, chip)[0] in between
    assert all(between.count(config) == 1 for config in between)


def test_no_tile_takes_all_registers_of_an_older_gpu() -> None:
    """Two sums of 128x128 are half of them; without wgmma the factors want the rest, and more."""
    hopper, ampere = (grouped_configs(8192, 8, 2, Chip(108, 1024 * kb)) for kb in (227, 163))
    assert hopper[0].tiles["BLOCK_M"] == hopper[0].tiles["BLOCK_N"] == 128
    assert 3 <= len(ampere) < len(hopper)
    assert all(config.tiles["BLOCK_M"] * config.tiles["BLOCK_N"] < 128 * 128 for config in ampere)


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, "in float32 an exact product has no tensor cores"),
        (torch.float64, "an input is float64"),
    ],
    ids=str,
)
def test_what_a_gpu_takes(dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert OP.triton is not None
    with FakeTensorMode(), standing_in_for(H100):
        x, weight = (torch.empty(size, dtype=dtype, device="cuda") for size in ((7, 12), (3, 12, 20)))
        found = OP.triton.refuses(x, weight, torch.empty(3, dtype=torch.int32, device="cuda"))
        assert found is None if reason is None else reason in str(found)
        elsewhere = OP.triton.refuses(x, weight, torch.empty(3, dtype=torch.int32))
    assert "the inputs are on cpu and cuda" in str(elsewhere)


def test_the_checks_see_a_row_of_another_expert() -> None:
    """An end that is one row off gives another result, in float16 too."""
    given, other = sample(61, SHARES[0]), [22, 22, 55, 56, 61]
    wrong = replace(given, args=(*given.args[:2], torch.tensor(other, device=DEVICE), *given.args[3:]))
    with pytest.raises(AssertionError):
        assert_right(OP, given, launched(OP, wrong))
