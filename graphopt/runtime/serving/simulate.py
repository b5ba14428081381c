"""A session on paper: the policy of the live one, run on a virtual clock and recorded batch times."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

from graphopt.runtime.serving.policy import BatchingPolicy, Request, Rules

BatchTime = Callable[[Hashable, int], float]


@dataclass(frozen=True)
class Arrival:
    """A request that will come.

    Args:
        at: when, in seconds.
        key: only requests of equal keys share a batch.
        rows: how much of a batch it takes.
        client: who asks.
        priority: larger ones go first.
        patience: seconds after which it is of no use any more.
    """

    at: float
    key: Hashable = None
    rows: int = 1
    client: str = ""
    priority: int = 0
    patience: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Args:
        arrival: the request.
        end: when it was answered, refused or given up.
        kind: in words.
        start: when its batch began; its end where it had none.
        batch: rows of its batch.
    """

    arrival: Arrival
    end: float
    kind: Literal["answered", "expired", "refused"]
    start: float
    batch: int = 0

    @property
    def latency(self) -> float:
        """Seconds from its coming to its end."""
        return self.end - self.arrival.at


@dataclass(frozen=True)
class Trace:
    """What a simulation shows.

    Args:
        outcomes: one a request, in order of their ends.
        busy: seconds that batches ran.
    """

    outcomes: list[Outcome]
    busy: float

    @property
    def answered(self) -> list[Outcome]:
        """Those with an answer."""
        return [outcome for outcome in self.outcomes if outcome.kind == "answered"]

    def throughput(self) -> float:
        """Rows answered a second, from the first arrival to the last answer."""
        answered = self.answered
        start = min(outcome.arrival.at for outcome in self.outcomes)
        return sum(outcome.arrival.rows for outcome in answered) / (answered[-1].end - start)

    def percentile(self, percent: int) -> float:
        """The latency that so many percent of the answered requests do not exceed, in seconds."""
        times = [outcome.latency for outcome in self.answered]
        return statistics.quantiles([*times, *times[:1]], n=100, method="inclusive")[percent - 1]


def simulate(
    arrivals: Iterable[Arrival],
    rules: Rules,
    batch_time: BatchTime,
    *,
    queue_size: int | None = None,
    after: Callable[[Outcome], Arrival | None] | None = None,
) -> Trace:
    """Run the policy on a virtual clock: one batch at a time, as a session does.

    Args:
        arrivals: the requests, in any order.
        rules: how batches are formed.
        batch_time: seconds that a batch takes, by its key and rows.
        queue_size: a request that finds so many waiting is refused; None for no bound.
        after: the request that follows on an outcome, not before it: closed-loop clients.

    Returns:
        What became of every request; the same in every run.
    """
    return _Simulation(rules, batch_time, queue_size, after).run(arrivals)


class _Simulation:
    def __init__(
        self,
        rules: Rules,
        batch_time: BatchTime,
        queue_size: int | None,
        after: Callable[[Outcome], Arrival | None] | None,
    ) -> None:
        self._policy = BatchingPolicy(rules)
        self._batch_time = batch_time
        self._queue_size = queue_size
        self._after = after
        self._coming: list[tuple[float, int, Arrival]] = []
        self._numbers = itertools.count()
        self._waiting: dict[int, Arrival] = {}
        self._outcomes: list[Outcome] = []

    def run(self, arrivals: Iterable[Arrival]) -> Trace:
        now, busy = -math.inf, 0.0
        for arrival in arrivals:
            self._expect(arrival)
        while self._coming or self._waiting:
            first = self._coming[0][0] if self._coming else math.inf
            now = max(now, min(first, self._policy.wake()))
            self._admit(now)
            for request in self._policy.expire(now):
                self._finish(Outcome(self._waiting.pop(request.number), now, "expired", now))
            batch = self._policy.next(now)
            if batch:
                took = self._serve(batch, now)
                now, busy = now + took, busy + took
        return Trace(self._outcomes, busy)

    def _expect(self, arrival: Arrival) -> None:
        heapq.heappush(self._coming, (arrival.at, next(self._numbers), arrival))

    def _admit(self, now: float) -> None:
        while self._coming and self._coming[0][0] <= now:
            at, number, arrival = heapq.heappop(self._coming)
            if self._queue_size is not None and len(self._policy) >= self._queue_size:
                self._finish(Outcome(arrival, at, "refused", at))
                continue
            self._waiting[number] = arrival
            deadline = at + arrival.patience
            self._policy.add(
                Request(number, arrival.key, arrival.rows, at, arrival.client, arrival.priority, deadline)
            )

    def _serve(self, batch: list[Request], now: float) -> float:
        rows = sum(request.rows for request in batch)
        took = self._batch_time(batch[0].key, rows)
        self._policy.observe(batch[0].key, took)
        for request in batch:
            arrival = self._waiting.pop(request.number)
            self._finish(Outcome(arrival, now + took, "answered", now, rows))
        return took

    def _finish(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        follows = self._after(outcome) if self._after is not None else None
        if follows is not None:
            self._expect(follows)
