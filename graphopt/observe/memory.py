"""Memory of the process, watched."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class PeakMemory:
    """The most resident memory that the process holds inside the block, over its start, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        start = resident_bytes()

        def watch() -> None:
            while not self._done.wait(0.005):
                self.peak = max(self.peak, resident_bytes() - start)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def resident_bytes() -> int:
    """Resident memory of this process, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
