"""Tensors side by side in Triton: bit for bit as PyTorch puts them, in its memory format.

Without a GPU the kernels run in Triton's interpreter, with one they run compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from graphopt.kernels._aten import FACES
from tests.kernels._faces import DEVICE, MARKS, fenced, fenced_allocations

pytestmark = MARKS

aten = torch.ops.aten
CAT = FACES[aten.cat.default]


def numbered(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randint(-100, 100, shape).to(DEVICE, dtype)


def assert_as_torch(tensors: Sequence[torch.Tensor], dim: int) -> None:
    assert CAT.refuses(tensors, dim) is None
    mine, torchs = CAT.launch(tensors, dim), torch.cat(list(tensors), dim)
    assert torch.equal(mine, torchs)
    assert (mine.dtype, mine.stride()) == (torchs.dtype, torchs.stride())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8], ids=str
)
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_along_every_dimension(dim: int, dtype: torch.dtype) -> None:
    shapes = [[3, 5, 7], [3, 5, 7], [3, 5, 7]]
    for place, size in enumerate((1, 4, 9)):
        shapes[place][dim] = size
    assert_as_torch([numbered(*shape, dtype=dtype) for shape in shapes], dim)


def test_rows_longer_than_a_tile_and_more_than_one_program_takes() -> None:
    assert_as_torch([numbered(3, 20011), numbered(3, 1)], 1)
    assert_as_torch([numbered(5003, 3), numbered(5003, 2)], 1)


def test_a_token_for_every_image_is_read_where_it_is() -> None:
    token = numbered(1, 1, 24).expand(4, 1, 24)
    assert_as_torch([token, numbered(4, 9, 24)], 1)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_images_stay_channels_last(dim: int) -> None:
    shapes = [[2, 4, 3, 5], [2, 4, 3, 5]]
    shapes[1][dim] = 6
    images = [numbered(*shape).contiguous(memory_format=torch.channels_last) for shape in shapes]
    assert_as_torch(images, dim)
    assert CAT.launch(images, dim).is_contiguous(memory_format=torch.channels_last)


def test_parts_of_larger_tensors() -> None:
    wide = numbered(6, 10, 16)
    assert_as_torch([wide[:, :3, 2:9], wide[:, 4:, 1:8]], 1)
    assert_as_torch([wide[::2], wide[1::2]], 0)
    assert_as_torch([wide[..., ::2], wide[..., 1::2]], 2)


def test_nothing_is_read_or_written_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [fenced(numbered(5, length), 99.0)[1] for length in (33, 70)]
    with fenced_allocations(monkeypatch):
        assert torch.equal(CAT.launch(given, 1), torch.cat(given, 1))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([], "0 tensors"),
        ([numbered(2, 3)] * 9, "9 tensors"),
        ([numbered(2, 3), numbered(2, 3, dtype=torch.int64)], "differ in dtype or rank"),
        ([numbered(0), numbered(2, 3)], "differ in dtype or rank"),
        ([numbered(0, 3), numbered(2, 3)], "empty"),
        ([numbered(2, 3).to(torch.complex64)] * 2, "no torch.complex64"),
        ([numbered(2, 3).double()] * 2, "float64"),
        (
            [numbered(2, 3, 4, 4), numbered(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)],
            "ATen's",
        ),
        ([numbered(3, 4).T, numbered(4, 3)], "ATen's"),
    ],
)
def test_what_is_left_to_aten(tensors: list[torch.Tensor], reason: str) -> None:
    said = CAT.refuses(tensors, 0)
    assert said is not None
    assert reason in said
