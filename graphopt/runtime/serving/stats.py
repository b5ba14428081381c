"""What a session counts, in memory of fixed size."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, deque
from typing import Any

_RECENT = 2048  # requests and batches whose times are kept


class Stats:
    """Counts and recent times of a session; safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._rows: Counter[int] = Counter()
        self._waits: deque[float] = deque(maxlen=_RECENT)
        self._batches: deque[float] = deque(maxlen=_RECENT)

    def count(self, what: str, times: int = 1) -> None:
        """Count an event: answered, failed, expired, cancelled, refused."""
        with self._lock:
            self._counts[what] += times

    def batch(self, rows: int, seconds: float, waits: list[float]) -> None:
        """Note a batch: its rows, how long it ran, how long its requests had waited, in seconds."""
        with self._lock:
            self._counts["batches"] += 1
            self._rows[rows] += 1
            self._batches.append(seconds)
            self._waits.extend(waits)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: counts, batches by their rows, and milliseconds waited and run, of the recent ones."""
        with self._lock:
            kinds = ("answered", "failed", "expired", "cancelled", "refused", "batches")
            return {
                **{kind: self._counts[kind] for kind in kinds},
                "batch_rows": dict(sorted(self._rows.items())),
                "wait_ms": _summary(self._waits),
                "batch_ms": _summary(self._batches),
            }


def _summary(times: deque[float]) -> dict[str, float] | None:
    if not times:
        return None
    cuts = statistics.quantiles([*times, times[0]], n=100, method="inclusive")
    return {
        "median": round(1e3 * cuts[49], 3),
        "p99": round(1e3 * cuts[98], 3),
        "max": round(1e3 * max(times), 3),
    }
