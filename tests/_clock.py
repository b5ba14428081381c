"""Time that passes only where a test says so: no test then depends on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Stands in the place of a module's ``time``.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def sleeping(self, seconds: float) -> Callable[[], None]:
        """A call that takes so long."""
        return lambda: self.sleep(seconds)
