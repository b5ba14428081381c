"""What the target device can do at most."""

from __future__ import annotations

import difflib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from graphopt.errors import TargetError


@dataclass(frozen=True)
class Limits:
    """A device's ceilings.

    Args:
        name: of the device.
        flops_per_s: of a large matrix product in float32.
        bytes_per_s: of a large copy, read and written bytes counted.
        by_dtype: FLOPs a second of a large matrix product in other dtypes; those that are missing run as
            float32 does.
        capability: compute capability of a GPU, (9, 0) for an H100.
        processors: streaming multiprocessors of a GPU.
        shared_memory: bytes of it that a program on a GPU may have.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    by_dtype: Mapping[torch.dtype, float] = field(default_factory=dict, hash=False)
    capability: tuple[int, int] = (0, 0)
    processors: int = 0
    shared_memory: int = 0

    def flops_in(self, dtype: torch.dtype) -> float:
        """FLOPs a second in a dtype."""
        return self.by_dtype.get(dtype, self.flops_per_s)


def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache; 0 for what is none."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _gpu(
    name: str,
    rates: tuple[float, float, float],
    gigabytes: float,
    capability: tuple[int, int],
    processors: int,
    kibibytes: int,
) -> Limits:
    float32, half, float8 = rates
    dtypes = {torch.float16: half, torch.bfloat16: half}
    if float8:
        dtypes |= {torch.float8_e4m3fn: float8, torch.float8_e5m2: float8}
    by_dtype = {key: rate * 1e12 for key, rate in dtypes.items()}
    shared = kibibytes * 1024
    return Limits(name, float32 * 1e12, gigabytes * 1e9, by_dtype, capability, processors, shared)


# TFLOP/s in float32 (no TF32, as in PyTorch by default), in float16 and bfloat16, in float8, and GB/s, all
# dense, from NVIDIA's datasheets of the SXM modules (L4: PCIe); compute capability, multiprocessors, and KiB
# of shared memory a program, from its tuning guides.
GPUS: Mapping[str, Limits] = {
    "h100": _gpu("h100", (67.0, 989.4, 1978.9), 3350.0, (9, 0), 132, 227),
    "h200": _gpu("h200", (67.0, 989.4, 1978.9), 4800.0, (9, 0), 132, 227),
    "a100": _gpu("a100", (19.5, 312.0, 0.0), 2039.0, (8, 0), 108, 163),
    "l4": _gpu("l4", (30.3, 121.0, 242.0), 300.0, (8, 9), 58, 99),
}


def gpu_limits(name: str) -> Limits:
    """The ceilings of a GPU, by the name of its model (``"h100"``) or as CUDA tells it.

    Raises:
        TargetError: the table has no such GPU; near names are listed.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    for word in words:
        if word in GPUS:
            return GPUS[word]
    near = difflib.get_close_matches(name.lower(), GPUS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise TargetError(f"no limits are known of {name!r}", hint=f"{hint}the table has: {', '.join(GPUS)}")


def device_limits(device: torch.device) -> Limits:
    """The ceilings of a device that is there: of the CPU measured, of a GPU by its name.

    A GPU that the table does not have is taken for an L4, the slowest in it.
    """
    if device.type != "cuda":
        return cpu_limits()
    try:
        return gpu_limits(torch.cuda.get_device_name(device))
    except TargetError:
        return GPUS["l4"]


@functools.cache
def cpu_limits() -> Limits:
    """The ceilings of this machine's CPU, measured once a process (about 0.2 s)."""
    rates = {dtype: _product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    big = torch.randn(8 * 2**20)
    out = torch.empty_like(big)
    copy = _best_seconds(lambda: out.copy_(big))
    moved = 2.0 * big.numel() * big.element_size()
    return Limits("cpu", rates.pop(torch.float32), moved / copy, rates)


def _product_rate(dtype: torch.dtype) -> float:
    a = torch.randn(768, 768).to(dtype)
    return 2.0 * 768**3 / _best_seconds(lambda: torch.mm(a, a))


def _best_seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
