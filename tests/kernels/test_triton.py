"""Every op's Triton kernels: right in the interpreter or on a GPU, inside their buffers, the same twice.

Without a GPU they run in Triton's interpreter, with one they run compiled; ``tests/conftest.py`` decides.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphopt.ir.op import OPS, Op, Sample, TritonFace
from graphopt.kernels import _triton
from tests.kernels.test_ops import assert_right, cast, mapped, outputs, samples, tensors, within_half

FACES = [op for op in OPS.values() if op.triton is not None]
CASES = [pytest.param(op, s, id=f"{op.name}-{s.label}") for op in FACES for s in samples(op.name)]
over_samples = pytest.mark.parametrize(("op", "sample"), CASES)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")


def prepared(op: Op, sample: Sample, dtype: torch.dtype) -> Sample:
    """The sample in a dtype, on the device; a skip where its results overflow float16."""
    if dtype == torch.float16 and not within_half(op, cast(sample, dtype)):
        pytest.skip("overflows float16")
    return mapped(cast(sample, dtype), lambda x: x.to(DEVICE))


def launched(op: Op, sample: Sample) -> list[torch.Tensor]:
    assert op.triton is not None
    reason = op.triton.refuses(*sample.args, **sample.kwargs)
    if reason is not None:
        pytest.skip(reason)
    return outputs(op.triton.launch, sample)


@over_samples
@over_dtypes
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


@over_samples
def test_results_are_the_same_twice(op: Op, sample: Sample) -> None:
    sample = prepared(op, sample, torch.float16)
    for once, again in zip(launched(op, sample), launched(op, sample), strict=True):
        assert torch.equal(once, again)


def test_the_check_tells_right_from_wrong() -> None:
    op = OPS["quick_gelu"]
    sample = prepared(op, samples(op.name)[0], torch.float32)
    wrong = replace(op, triton=TritonFace(lambda *args: op.reference(*args) + 1e-3, lambda *args: None))
    with pytest.raises(AssertionError):
        assert_right(wrong, sample, launched(wrong, sample))
    refusing = replace(op, triton=TritonFace(op.reference, lambda *args: "not today"))
    with pytest.raises(pytest.skip.Exception, match="not today"):
        launched(refusing, sample)
