"""What the driver is asked for: streams of graphs' own, and the share of a processor's memory."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from graphopt.kernels import _driver
from graphopt.kernels._driver import own_stream, prefer_shared_memory

GPU = torch.device("cuda", 0)


class Driver:
    """What ctypes loads: makes streams by number, or refuses."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.made, self.flags = code, 0, -1
        self.attributes: list[tuple[int, int, int]] = []

    def cuStreamCreate(self, place: Any, flags: ctypes.c_uint) -> int:  # noqa: N802 - the driver's name
        self.flags = flags.value
        if self.code == 0:
            self.made += 1
            place._obj.value = 4096 * self.made
        return self.code

    def cuFuncSetAttribute(self, function: Any, name: Any, value: Any) -> int:  # noqa: N802 - the driver's name
        self.attributes.append((function.value, name.value, value.value))
        return self.code


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams as tuples that tell where they are from."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("PyTorch's", device))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda number, device: (number, device))


@pytest.mark.usefixtures("streams")
def test_every_program_has_another_stream_that_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(_driver.ctypes, "CDLL", lambda name: driver)
    assert own_stream(GPU) == (4096, GPU)
    assert own_stream(GPU) == (8192, GPU)
    assert driver.flags == 1


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize(
    "refuses", [lambda name: Driver(code=2), lambda name: ctypes.CDLL("no such library")]
)
def test_without_one_it_warns_and_takes_pytorchs(refuses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL
    monkeypatch.setattr(
        _driver.ctypes,
        "CDLL",
        lambda name: refuses(name) if name.startswith(("lib", "nv")) else library(name),
    )
    with pytest.warns(RuntimeWarning, match="the driver gives no stream"):
        assert own_stream(GPU) == ("PyTorch's", GPU)


def test_a_kernel_asks_for_all_shared_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(_driver.ctypes, "CDLL", lambda name: driver)
    prefer_shared_memory.cache_clear()
    assert prefer_shared_memory(4096)
    assert prefer_shared_memory(4096)
    assert prefer_shared_memory(8192)
    assert driver.attributes == [(4096, 9, 100), (8192, 9, 100)]
    prefer_shared_memory.cache_clear()


@pytest.mark.parametrize(
    "refuses",
    [lambda name: Driver(code=1), lambda name: ctypes.CDLL("no such library"), lambda name: object()],
)
def test_a_driver_that_refuses_the_share_is_no_failure(refuses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL
    monkeypatch.setattr(
        _driver.ctypes,
        "CDLL",
        lambda name: refuses(name) if name.startswith(("lib", "nv")) else library(name),
    )
    prefer_shared_memory.cache_clear()
    assert not prefer_shared_memory(4096)
    prefer_shared_memory.cache_clear()
