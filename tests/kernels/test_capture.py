"""The stream that graphs are captured on: the driver's own, or one of PyTorch's with a warning."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from graphopt.kernels import _capture
from graphopt.kernels._capture import own_stream

GPU = torch.device("cuda", 0)


class Driver:
    """What ctypes loads: makes streams by number, or refuses."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.made, self.flags = code, 0, -1

    def cuStreamCreate(self, place: Any, flags: ctypes.c_uint) -> int:  # noqa: N802 - the driver's name
        self.flags = flags.value
        if self.code == 0:
            self.made += 1
            place._obj.value = 4096 * self.made
        return self.code


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams as tuples that tell where they are from."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("PyTorch's", device))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda number, device: (number, device))


@pytest.mark.usefixtures("streams")
def test_every_program_has_another_stream_that_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(_capture.ctypes, "CDLL", lambda name: driver)
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
        _capture.ctypes,
        "CDLL",
        lambda name: refuses(name) if name.startswith(("lib", "nv")) else library(name),
    )
    with pytest.warns(RuntimeWarning, match="the driver gives no stream"):
        assert own_stream(GPU) == ("PyTorch's", GPU)
