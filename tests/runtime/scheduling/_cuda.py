"""A stand-in for ``torch.cuda`` that notes what is queued where, and who waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Event:
    """What a stream has reached."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def __str__(self) -> str:
        return self.name

    def synchronize(self) -> None:
        self._log.append(f"the host waits for {self.name}")


class Stream:
    """A stream that notes what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def record_event(self) -> Event:
        event = Event(f"e{sum(' records ' in line for line in self._log)}", self._log)
        self._log.append(f"{self.name} records {event}")
        return event

    def wait_event(self, event: Event) -> None:
        self._log.append(f"{self.name} waits for {event}")

    def wait_stream(self, stream: Stream) -> None:
        self._log.append(f"{self.name} waits for {stream.name}")

    def synchronize(self) -> None:
        self._log.append(f"the host waits for {self.name}")


class Cuda:
    """What is used of ``torch.cuda``."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.on = "caller"
        self.made = 0

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802
        self.made += 1
        return Stream(f"s{self.made}", self.log)

    def current_stream(self, device: torch.device) -> Stream:
        return Stream("caller", self.log)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.on = stream.name
        yield
        self.on = "caller"
