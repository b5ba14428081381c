"""Every op's Triton kernels: right in the interpreter or on a GPU, inside their buffers, the same twice.

Without a GPU they run in Triton's interpreter, with one they run compiled; ``tests/conftest.py`` decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from graphopt.ir.op import OPS, Op, Sample, TritonFace
from tests.kernels._faces import DEVICE, MARKS, assert_fences_hold, launched, prepared
from tests.kernels.test_mixed_types import MIXED, SUMS
from tests.kernels.test_ops import assert_right, mapped, outputs, samples, tensors

FACES = [op for op in OPS.values() if op.triton is not None]
SAMPLES = {op.name: samples(op.name) for op in FACES}
CASES = [pytest.param(op, s, id=f"{op.name}-{s.label}") for op in FACES for s in SAMPLES[op.name]]
FIRST = [pytest.param(op, SAMPLES[op.name][0], id=op.name) for op in FACES]
over_samples = pytest.mark.parametrize(("op", "sample"), CASES)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def with_dtypes() -> Iterator[Any]:
    """Every sample; on a GPU in every dtype, interpreted in one of them, and an op's first sample in all.

    In the interpreter a dtype changes what is loaded and stored, which every sample of an op does alike.
    """
    for op in FACES:
        for place, sample in enumerate(SAMPLES[op.name]):
            every = DEVICE == "cuda" or place == 0
            for dtype in DTYPES if every else (DTYPES[place % len(DTYPES)],):
                yield pytest.param(op, sample, dtype, id=f"{op.name}-{sample.label}-{dtype}")


pytestmark = MARKS


@pytest.mark.parametrize(("op", "sample", "dtype"), with_dtypes())
def test_kernel_is_right(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    sample = prepared(op, sample, dtype)
    assert_right(op, sample, launched(op, sample))


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after every element, and rows that do not lie one behind the other."""
    wide = torch.full((*x.shape, 2), 7, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


@over_samples
def test_strided_inputs_are_right(op: Op, sample: Sample) -> None:
    strided = mapped(prepared(op, sample, torch.float16), spread)
    assert all(x.numel() <= 1 or not x.is_contiguous() for x in tensors(strided))
    assert_right(op, strided, launched(op, strided))


# The interpreter runs one program after the other, and what is not written is seen between fences below.
@pytest.mark.parametrize(("op", "sample"), CASES if DEVICE == "cuda" else FIRST)
def test_results_are_the_same_twice(op: Op, sample: Sample) -> None:
    sample = prepared(op, sample, torch.float16)
    for once, again in zip(launched(op, sample), launched(op, sample), strict=True):
        assert torch.equal(once, again)


@over_samples
def test_nothing_outside_of_a_buffer_is_read_or_written(
    op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = mapped(prepared(op, sample, torch.float32), lambda x: x.contiguous())
    assert_fences_hold(op, sample, monkeypatch)


@pytest.mark.parametrize("op", FACES, ids=lambda op: op.name)
def test_nothing_comes_of_nothing(op: Op) -> None:
    """Inputs whose batch is empty: results are empty too, or what a sum or a mean of nothing is."""
    first = prepared(op, samples(op.name)[0], torch.float16)
    batch = tensors(first)[0].shape[0]
    empty = mapped(first, lambda x: x[:0] if x.shape[0] == batch else x)
    for mine, other in zip(launched(op, empty), outputs(op.reference, empty), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in MIXED if MIXED[name](torch.float16)[0].triton])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_types_are_right(name: str, dtype: torch.dtype) -> None:
    op, args = MIXED[name](dtype)
    sample = mapped(Sample(args), lambda x: x.to(DEVICE))
    assert_right(op, sample, launched(op, sample))


@pytest.mark.parametrize("name", [name for name in SUMS if SUMS[name](torch.float16)[0].triton])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_kept_in_float32(name: str, dtype: torch.dtype) -> None:
    op, args = SUMS[name](dtype)
    sample = mapped(Sample(args), lambda x: x.to(DEVICE))
    normed, total = launched(op, sample)
    assert torch.equal(total, sample.args[0].float() + sample.args[1].float())
    assert_right(op, sample, [normed, total])


def test_the_check_tells_right_from_wrong() -> None:
    op = OPS["quick_gelu"]
    sample = prepared(op, samples(op.name)[0], torch.float32)
    wrong = replace(op, triton=TritonFace(lambda *args: op.reference(*args) + 1e-3, lambda *args: None))
    with pytest.raises(AssertionError):
        assert_right(wrong, sample, launched(wrong, sample))
    refusing = replace(op, triton=TritonFace(op.reference, lambda *args: "not today"))
    with pytest.raises(pytest.skip.Exception, match="not today"):
        launched(refusing, sample)
