"""What the target device can do at most."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """A device's ceilings.

    Args:
        name: of the device.
        flops_per_s: of a large matrix product in the model's dtype.
        bytes_per_s: of a large copy, read and written bytes counted.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float


@functools.cache
def cpu_limits() -> Limits:
    """The ceilings of this machine's CPU in float32, measured once a process (about 0.1 s)."""
    a = torch.randn(768, 768)
    big = torch.randn(8 * 2**20)
    out = torch.empty_like(big)
    product = _best_seconds(lambda: torch.mm(a, a))
    copy = _best_seconds(lambda: out.copy_(big))
    return Limits("cpu", 2.0 * 768**3 / product, 2.0 * big.numel() * big.element_size() / copy)


def _best_seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
