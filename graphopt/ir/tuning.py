"""Which nodes an op's ONNX face emits, where the best ones depend on the device that runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Tuning = Literal["any", "cpu"]
_tuning: ContextVar[Tuning] = ContextVar("graphopt_onnx_tuning", default="any")


def tuning() -> Tuning:
    """What the lowerings called now are tuned for."""
    return _tuning.get()


@contextmanager
def tuned_for(device: Tuning) -> Iterator[None]:
    """Tune the lowerings that are called inside the block.

    Args:
        device: "any" takes the fused node, "cpu" what ONNX Runtime's CPU provider runs fastest.
    """
    token = _tuning.set(device)
    try:
        yield
    finally:
        _tuning.reset(token)
