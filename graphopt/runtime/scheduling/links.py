"""What it takes to bring data from one device to another: measured where the devices are, else a table's."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence

import torch

from graphopt.runtime.scheduling.tasks import Device, Machine

# Estimates, in bytes a second: a PCIe 4.0 x16 slot between host and GPU, and between two GPUs by way of it.
_BY_KIND = {("cpu", "cuda"): 25e9, ("cuda", "cuda"): 25e9}
_LATENCY_S = 20e-6  # queueing a copy and two events, from Python
_BYTES, _RUNS = 2**24, 4


def machine_of(devices: Sequence[torch.device], *, measured: bool) -> Machine:
    """Devices that are here, each of a kind of its own: even equal ones hold different values.

    Args:
        devices: the first is the one that inputs and outputs are on.
        measured: time a copy of 16 MiB between any two, once a process; otherwise a table serves.
    """
    rates = {}
    for one, two in itertools.combinations(devices, 2):
        first, second = sorted((one.type, two.type))
        known = _BY_KIND.get((first, second))
        if known is not None:
            rates[str(one), str(two)] = _measured_rate(one, two) if measured else known
    names = tuple(Device(str(device), str(device)) for device in devices)
    return Machine(names, rates, latency_s=_LATENCY_S)


@functools.cache
def _measured_rate(one: torch.device, two: torch.device) -> float:
    """Bytes a second from pinned memory or a GPU to the other device, the best of a few copies."""
    x = torch.ones(_BYTES, dtype=torch.uint8, device=one, pin_memory=one.type == "cpu")
    y = torch.empty(_BYTES, dtype=torch.uint8, device=two, pin_memory=two.type == "cpu")
    best = float("inf")
    for _ in range(_RUNS):
        _wait(one, two)
        start = time.perf_counter()
        y.copy_(x, non_blocking=True)
        _wait(one, two)
        best = min(best, time.perf_counter() - start)
    return _BYTES / best


def _wait(*devices: torch.device) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
