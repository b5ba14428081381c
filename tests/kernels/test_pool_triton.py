"""Pooling in Triton: as PyTorch does it, bit for bit where nothing is rounded.

Without a GPU the kernels run in Triton's interpreter, with one they run compiled.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.kernels._aten import FACES
from tests.kernels._faces import DEVICE, MARKS, fenced, fenced_allocations

pytestmark = MARKS

aten = torch.ops.aten
MAX, MEAN = FACES[aten.max_pool2d.default], FACES[aten.adaptive_avg_pool2d.default]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def images(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(sizes).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def exactly(args: tuple[Any, ...]) -> torch.Tensor:
    """Launched, and the same as PyTorch's, layout included."""
    assert MAX.refuses(*args) is None
    made = MAX.launch(*args)
    other = aten.max_pool2d.default(*args)
    assert made.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made, other, rtol=0, atol=0, equal_nan=True)
    return made


WINDOWS = {
    "ResNet's": ([3, 3], [2, 2], [1, 1]),
    "one number for both": ([2],),
    "no overlap": ([2, 3], [], [0, 1]),
    "dilated": ([3, 2], [1, 2], [1, 0], [2, 3]),
    "ceil mode": ([3, 3], [2, 2], [0, 0], [1, 1], True),
    "ceil mode, a window that would begin outside": ([2, 2], [2, 2], [1, 1], [1, 1], True),
    "steps over pixels": ([1, 2], [3, 4]),
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_largest_values(window: tuple[Any, ...]) -> None:
    exactly((images(2, 5, 11, 14), *window))


@HALVES
def test_more_channels_than_a_program_takes(dtype: torch.dtype) -> None:
    exactly((images(3, 70, 7, 6, dtype=dtype), [3, 3], [2, 2], [1, 1]))


def test_what_is_no_number_and_what_is_infinite() -> None:
    x = images(1, 8, 9, 9)
    x[0, :, 2, 3], x[0, :, 6], x[0, 1] = math.nan, math.inf, -math.inf
    assert exactly((x, [3, 3], [2, 2], [1, 1])).isnan().any()


def test_every_second_image_and_none() -> None:
    x = images(4, 8, 6, 6)
    exactly((x[::2], [2, 2]))
    assert MAX.launch(x[:0], [2, 2]).shape == (0, 8, 3, 3)
    assert MEAN.launch(x[:0], [1, 1]).shape == (0, 8, 1, 1)


@HALVES
@pytest.mark.parametrize("size", [(2, 33, 7, 7), (1, 8, 1, 5), (3, 130, 15, 20)], ids=str)
def test_the_mean(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rounded once: half a unit in the last place of float64's, and what the sum in float32 adds."""
    x = images(*size, dtype=dtype)
    made = MEAN.launch(x, [1, 1])
    exact = F.adaptive_avg_pool2d(x.double(), [1, 1])
    assert made.shape == exact.shape
    assert made.dtype == dtype
    room = torch.finfo(dtype).eps * exact.abs() + 1e-5 * x.double().abs().mean((2, 3), keepdim=True)
    assert ((made.double() - exact).abs() <= room).all()


def test_the_mean_of_infinities_and_of_what_is_no_number() -> None:
    x = images(1, 4, 3, 3)
    x[0, 0, 1, 1], x[0, 1, 0, 0] = math.nan, math.inf
    made = MEAN.launch(x, [1])[0, :, 0, 0]
    assert made[0].isnan()
    assert made[1] == math.inf
    assert made[2:].isfinite().all()


@pytest.mark.parametrize("face", [MAX, MEAN], ids=["max", "mean"])
def test_nothing_outside_of_a_buffer_is_read_or_written(face: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(3, 5, 6, 7, dtype=torch.float32)
    rest = ([3, 3], [2, 2], [1, 1]) if face is MAX else ([1, 1],)
    expected = face.launch(x, *rest)
    _, inside = fenced(x.permute(0, 2, 3, 1).contiguous(), math.nan)
    with fenced_allocations(monkeypatch) as made:
        found = face.launch(inside.permute(0, 3, 1, 2), *rest)
    assert torch.equal(found, expected)
    assert len(made) == 1


def test_what_is_refused() -> None:
    x = images(2, 8, 6, 6)
    assert "not channels last" in str(MAX.refuses(x.contiguous(), [2, 2]))
    assert "not channels last" in str(MEAN.refuses(x[0], [1, 1]))
    assert "more than 32 pixels" in str(MAX.refuses(x, [6, 6]))
    assert "and not one" in str(MEAN.refuses(x, [2, 2]))
    assert "torch.int8" in str(MAX.refuses(x.to(torch.int8), [2, 2]))
    large = torch.empty(1, 2, 40000, 40000, device="meta", memory_format=torch.channels_last)
    assert "2**31" in str(MAX.refuses(large, [2, 2]))
