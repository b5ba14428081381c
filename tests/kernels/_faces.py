"""An op's Triton face run as its tests want it: on this machine's device, in a dtype, between fences.

Without a GPU kernels run in Triton's interpreter, with one they run compiled; ``tests/conftest.py`` decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from graphopt.ir.op import Op, Sample
from graphopt.kernels import _triton
from tests.kernels.test_ops import cast, mapped, outputs, tensors, within_half

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),  # `pytest -m gpu` runs them there, compiled
]
FENCE = 64  # elements on either side of a buffer, and a whole number of vectors of 16 bytes
_GARBAGE = 7  # what stands in memory that nobody has written, and behind its end


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


def fenced(x: torch.Tensor, fence: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of the fence's value with a copy of a tensor in its middle, and the copy."""
    buffer = torch.full((x.numel() + 2 * FENCE,), fence, device=x.device).to(x.dtype)
    inside = buffer[FENCE : FENCE + x.numel()].view(x.shape)
    inside.copy_(x)
    return buffer, inside


@contextmanager
def fenced_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Full of garbage between sentinels is all that launchers allocate inside the block: the list.

    At the end of the block the sentinels must still be there.
    """
    buffers: list[torch.Tensor] = []
    new_empty = torch.Tensor.new_empty

    def fenced_empty(x: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made = new_empty(x, *size, **options)
        if "device" in options:  # the interpreter's own
            return made
        buffer, inside = fenced(torch.full_like(made, _GARBAGE), _GARBAGE)
        buffers.append(buffer)
        return inside

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", fenced_empty)
        yield buffers
    for buffer in buffers:
        assert (buffer[:FENCE] == _GARBAGE).all()
        assert (buffer[-FENCE:] == _GARBAGE).all()


def assert_fences_hold(op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Launch with inputs between values that spoil every result, and all that is allocated full of garbage
    between sentinels; neither may be seen in the results, nor be written over.

    Args:
        op: the op.
        sample: of contiguous tensors on the device.
        monkeypatch: to allocate by.

    Returns:
        The results.
    """
    expected = launched(op, sample)
    read = mapped(sample, lambda x: fenced(x, math.nan if x.is_floating_point() else 1)[1])
    before = [x.clone() for x in tensors(read)]
    with fenced_allocations(monkeypatch) as made:
        found = launched(op, read)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(tensors(read), before, strict=True))
    assert len(made) >= len(found)
    return found
