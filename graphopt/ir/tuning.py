"""Which nodes an op's ONNX face emits, where the best ones depend on what runs them.

A face names its spellings in a table, one for each runner that wants its own, and takes one with ``spelled``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeVar

# "any": the fused nodes that ONNX Runtime has for every device; "cpu" and "cuda": what its provider for that
# device runs fastest; "openvino": what OpenVINO reads right and has kernels for; "portable": ONNX's own
# operators only, for any runtime.
Tuning = Literal["any", "cpu", "cuda", "openvino", "portable"]
_tuning: ContextVar[Tuning] = ContextVar("graphopt_onnx_tuning", default="any")

Spelling = TypeVar("Spelling")


def tuning() -> Tuning:
    """What the lowerings called now are tuned for."""
    return _tuning.get()


def spelled(spellings: Mapping[Tuning, Spelling]) -> Spelling:
    """The spelling for what the lowerings are tuned for; that of "any" where it has none of its own."""
    return spellings.get(tuning(), spellings["any"])


@contextmanager
def tuned_for(device: Tuning) -> Iterator[None]:
    """Tune the lowerings that are called inside the block.

    Args:
        device: what runs them; see ``Tuning``.
    """
    token = _tuning.set(device)
    try:
        yield
    finally:
        _tuning.reset(token)
