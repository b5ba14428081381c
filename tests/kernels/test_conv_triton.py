"""Convolutions in Triton: every geometry, cut up in every way, inside their buffers.

Without a GPU they run in Triton's interpreter, with one they run compiled.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from graphopt.ir.op import OPS, Sample
from graphopt.kernels import _conv_triton
from graphopt.kernels._conv_triton import (
    conv_configs,
    convolve,
    convolve_as_product,
    is_product,
    refuse_convolution,
)
from graphopt.kernels._linear_configs import Chip
from graphopt.kernels._tuning import Config
from tests.kernels._faces import MARKS, fenced, fenced_allocations, launched, prepared
from tests.kernels.test_ops import assert_right

pytestmark = MARKS

OP = OPS["conv_activation"]
LAST = torch.channels_last
H100 = Chip(132, 227 * 1024)


def drawn(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes).contiguous(memory_format=LAST)


def sample(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "relu",
    **extra: bool,
) -> Sample:
    """A call on random operands of these sizes; with ``residual=True``, and ``bias=False``."""
    weights = drawn(*weight) / weight[1] ** 0.5
    bias = torch.randn(weight[0]) if extra.get("bias", True) else None
    args: tuple[Any, ...] = (drawn(*x), weights.contiguous(memory_format=LAST), bias)
    args = *args, [stride] * 2, list(padding), list(dilation), 1, activation, 1.0
    size = torch.nn.functional.conv2d(args[0], weights, None, *args[3:6]).shape
    return Sample((*args, drawn(*size) if extra.get("residual") else None))


CASES = {
    "pixels": sample((2, 16, 5, 7), (24, 16, 1, 1), residual=True),
    "odd channels": sample((3, 5, 6, 7), (7, 5, 3, 3), padding=(1, 1), activation="gelu"),
    "strided pixels": sample((2, 16, 7, 9), (20, 16, 1, 1), 2, activation="none"),
    "a stem": sample((1, 3, 17, 15), (8, 3, 7, 7), 2, (3, 3)),
    "an uneven filter": sample((2, 8, 9, 6), (16, 8, 3, 2), 1, (0, 1), residual=True),
    "dilated down a column": sample((1, 8, 11, 6), (16, 8, 3, 1), 1, (2, 0), (2, 5), bias=False),
    "one pixel": sample((3, 16, 3, 3), (17, 16, 3, 3)),
    "padding beyond the filter": sample((1, 16, 2, 2), (4, 16, 2, 2), 1, (2, 2), activation="none"),
    "one image, one channel made": sample((1, 32, 4, 4), (1, 32, 3, 3), 1, (1, 1), residual=True),
}
BLOCKS = "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SPLITS"
CUTS = {
    sizes: Config(dict(zip(BLOCKS, sizes, strict=True))) for sizes in ((16, 16, 16, 2, 1), (32, 16, 32, 8, 3))
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
over_cuts = pytest.mark.parametrize("cut", CUTS.values(), ids=map(str, CUTS))


@over_cases
@over_cuts
def test_every_geometry_in_every_cut(case: Sample, cut: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conv_triton, "choose", lambda *_: cut)
    case = prepared(OP, case, torch.float16)
    (made,) = launched(OP, case)
    assert_right(OP, case, [made])
    assert made.is_contiguous(memory_format=LAST)


@over_cases
@over_cuts
def test_nothing_outside_of_a_buffer_is_read_or_written(
    case: Sample, cut: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands lie between values that spoil every sum; what is allocated, between sentinels."""
    monkeypatch.setattr(_conv_triton, "choose", lambda *_: cut)
    case = prepared(OP, case, torch.float32)
    (expected,) = launched(OP, case)
    x, weight, bias, *where, residual = case.args
    inside = [None if v is None else between(v, float("nan"))[1] for v in (x, weight, residual)]
    vector = None if bias is None else fenced(bias, float("nan"))[1]
    with fenced_allocations(monkeypatch) as made:
        found = convolve(inside[0], inside[1], vector, *where, inside[2])  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert len(made) == 1 + (cut.tiles["SPLITS"] > 1)


def between(x: torch.Tensor, fence: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``fenced``, for images that are channels last."""
    buffer, inside = fenced(x.permute(0, 2, 3, 1).contiguous(), fence)
    return buffer, inside.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_of_pixels(dtype: torch.dtype) -> None:
    for case in (CASES["pixels"], replace(CASES["pixels"], args=(*CASES["pixels"].args[:9], None))):
        cast = prepared(OP, case, dtype)
        fits = case.args[9] is None  # a residual before the relu is no epilogue of a product
        assert is_product(*cast.args) == fits
        if fits:
            made = convolve_as_product(*cast.args)
            assert_right(OP, cast, [made])
            assert made.is_contiguous(memory_format=LAST)
    plain = prepared(
        OP, replace(case, args=(*CASES["pixels"].args[:7], "none", 1.0, CASES["pixels"].args[9])), dtype
    )
    assert is_product(*plain.args)
    assert_right(OP, plain, [convolve_as_product(*plain.args)])


def test_what_is_no_product() -> None:
    for name in ("strided pixels", "odd channels", "an uneven filter"):
        assert not is_product(*prepared(OP, CASES[name], torch.float16).args)


def test_images_that_are_apart_and_none_at_all() -> None:
    case = prepared(OP, CASES["odd channels"], torch.float32)
    every_second = case.args[0][::2]
    found = convolve(every_second, *case.args[1:])
    assert torch.equal(found, convolve(*case.args)[::2])
    assert convolve(case.args[0][:0], *case.args[1:]).shape == (0, *found.shape[1:])


REFUSED = {
    "not channels last": (torch.randn(1, 8, 5, 5), torch.randn(4, 8, 3, 3)),
    "in 2 groups": (drawn(1, 8, 5, 5), drawn(4, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], 2),
    "dilated along a line": (drawn(1, 8, 9, 9), drawn(4, 8, 3, 3), None, [1, 1], [0, 0], [1, 2]),
    "of 1 dimensions": (torch.randn(1, 8, 5), torch.randn(4, 8, 3), None, [1], [0], [1]),
    r"2\*\*31 elements": (
        torch.empty(1, 2, 40000, 40000, device="meta", memory_format=LAST),
        drawn(2, 2, 1, 1),
    ),
}


@pytest.mark.parametrize(("reason", "args"), REFUSED.items(), ids=REFUSED)
def test_what_is_refused(reason: str, args: Any) -> None:
    found = refuse_convolution(*args)
    assert found is not None
    assert re.search(reason, found)


SHAPES = [
    (200704, 64, 192, 3),
    (3136, 64, 64, 1),
    (196, 256, 768, 3),
    (49, 512, 1536, 3),
    (802816, 64, 21, 7),
    (1, 1, 16, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_configurations_fit_a_processor_and_keep_many_busy(shape: tuple[int, int, int, int]) -> None:
    found = conv_configs(*shape, 2, H100)
    assert 1 <= len(found) <= 5
    pixels, channels, run, lines = shape
    for config in found:
        m, n, k, parts = (config.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS"))
        assert (m + n) * k * 2 * config.num_stages <= H100.shared
        assert parts == 1 or lines * -(-run // k) // parts >= 3
    if pixels >= 196:
        first = found[0].tiles
        programs = -(-pixels // first["BLOCK_M"]) * -(-channels // first["BLOCK_N"]) * first["SPLITS"]
        assert programs >= 0.35 * H100.processors


def test_a_depth_of_few_steps_is_not_cut() -> None:
    assert {config.tiles["SPLITS"] for config in conv_configs(49, 64, 64, 1, 2, H100)} == {1}
    assert max(config.tiles["SPLITS"] for config in conv_configs(49, 512, 1536, 3, 2, H100)) > 4
