from __future__ import annotations

import pytest
import torch

from graphopt.compiler.hostile import hostile_inputs
from tests._models import randn

MASK = torch.ones(2, 1, 4, 4, dtype=torch.bool)
VALUES = [randn(2, 4), torch.arange(4), MASK, randn(3), 7]
VARIES = [True, True, True, False, True]


def variations() -> dict[str, list[object]]:
    return dict(hostile_inputs(VALUES, VARIES))


def test_they_are_the_same_at_every_call() -> None:
    first, second = variations(), variations()
    assert list(first) == ["large magnitudes", "denormals", "non-contiguous strides", "masks with empty rows"]
    torch.manual_seed(1)
    for label, values in first.items():
        for left, right in zip(values, second[label], strict=True):
            assert left == right if isinstance(left, int) else torch.equal(left, right)


def test_they_are_what_they_are_called() -> None:
    found = variations()
    tiny = torch.finfo(torch.float32).tiny
    assert found["large magnitudes"][0].abs().max() > 1e3
    assert 0 < found["denormals"][0].abs().max() < tiny
    strided = found["non-contiguous strides"][0]
    assert not strided.is_contiguous()
    assert torch.equal(strided, VALUES[0])
    mask = found["masks with empty rows"][2]
    assert not mask.any(-1).all()
    assert mask.any()


def test_indices_literals_and_what_cannot_vary_stay() -> None:
    for label, values in variations().items():
        assert torch.equal(values[1], VALUES[1])
        assert torch.equal(values[3], VALUES[3])
        assert values[4] == 7
        assert torch.equal(values[2], MASK) is (label != "masks with empty rows")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_they_keep_shape_and_dtype(dtype: torch.dtype) -> None:
    values = [randn(3, 5).to(dtype), torch.zeros(0, 4, dtype=dtype), torch.tensor(1.0, dtype=dtype)]
    values += [torch.zeros(2, 0, dtype=torch.bool), torch.tensor(True)]
    found = dict(hostile_inputs(values, [True] * 5))
    assert len(found) == 4
    for varied in found.values():
        for value, given in zip(varied, values, strict=True):
            assert (value.shape, value.dtype) == (given.shape, given.dtype)
    assert torch.isfinite(found["large magnitudes"][0]).all()


def test_without_floats_or_masks_there_is_nothing_to_vary() -> None:
    assert list(hostile_inputs([torch.arange(3), 2], [True, True])) == []
    assert list(hostile_inputs([randn(3)], [False])) == []
