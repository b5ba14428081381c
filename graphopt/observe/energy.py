"""Energy, where the device tells: NVIDIA's GPUs through NVML, processors through the kernel's powercap."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_POWERCAP = Path("/sys/class/powercap")
_SECONDS = 1.0  # counters move every 20 to 100 ms: less would measure their steps


class Counter:
    """Counts the joules that a device has used.

    Args:
        read: the count in joules.
        wraps: the count at which it starts again from 0; infinite where it does not.
    """

    def __init__(self, read: Callable[[], float], wraps: float = float("inf")) -> None:
        self.read, self.wraps = read, wraps

    def joules(self, run: Callable[[], object], seconds: float = _SECONDS) -> float:
        """Joules of one call, the idle device's share included: the mean over calls of so many seconds."""
        calls, begin, start = 0, time.perf_counter(), self.read()
        while time.perf_counter() - begin < seconds:
            run()
            calls += 1
        used = self.read() - start
        return (used if used >= 0 else used + self.wraps) / calls


def counter(device: torch.device) -> Counter | None:
    """The counter of a device; None where there is none that this user may read."""
    return _gpu(device) if device.type == "cuda" else _cpu(_POWERCAP)


def _cpu(powercap: Path) -> Counter | None:
    """The processor packages' counters (RAPL); most systems let only root read them."""
    found = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    try:
        for path in found:
            _microjoules(path / "energy_uj")
        wraps = sum(_microjoules(path / "max_energy_range_uj") for path in found)
    except (OSError, ValueError):
        return None
    if len(found) != 1:  # several packages wrap one by one, and a sum does not tell which did
        wraps = float("inf")
    if not found:
        return None
    return Counter(lambda: sum(_microjoules(path / "energy_uj") for path in found), wraps)


def _microjoules(path: Path) -> float:
    return int(path.read_text()) / 1e6


def _gpu(device: torch.device) -> Counter | None:
    with contextlib.suppress(Exception):  # no package, no driver, or a GPU that does not count
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

        def read() -> float:
            torch.cuda.synchronize(device)
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        return Counter(read)
    return None
