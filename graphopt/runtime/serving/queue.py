"""The waiting requests of a live session: bounded, with back-pressure, and safe from every thread."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.errors import DeadlineError, QueueFullError, SessionClosedError
from graphopt.runtime.serving.policy import BatchingPolicy, Request, Rules
from graphopt.runtime.serving.streams import Origin


@dataclass(eq=False)
class Pending:
    """A request with its tensors and the future of its answer.

    Args:
        tensors: flat inputs.
        key: of its bucket.
        rows: of its batch dimension.
        client: who asks.
        priority: larger ones go first.
        patience: seconds after its coming at which it is of no use any more.
        origin: the caller's stream on a GPU.
    """

    tensors: Sequence[torch.Tensor]
    key: Hashable
    rows: int
    client: str = ""
    priority: int = 0
    patience: float = math.inf
    origin: Origin | None = None
    future: Future[Any] = field(default_factory=Future)
    number: int = -1
    arrival: float = 0.0


class RequestQueue:
    """Requests between those who ask and the thread that serves.

    A request takes a slot when it comes and gives it back when it leaves, to whoever waits for one the
    longest.

    Args:
        rules: how batches are formed.
        size: how many slots there are.
    """

    def __init__(self, rules: Rules, size: int) -> None:
        self.policy = BatchingPolicy(rules)
        self.closed = False
        self._changed = threading.Condition()
        self._wake = -math.inf  # when the serving thread looks again by itself
        self._free = size
        self._callers: deque[Future[None]] = deque()  # who waits for a slot
        self._pending: dict[int, Pending] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._pending)

    # Those who ask

    def put(self, pending: Pending, timeout: float | None) -> None:
        """Let a request wait for its turn.

        Args:
            pending: the request.
            timeout: seconds to wait for a slot; None for as long as it takes.

        Raises:
            QueueFullError: there was no slot in time.
            SessionClosedError: the session is closed.
        """
        caller = self._reserve(wait=timeout != 0)
        if caller is not None:
            try:
                caller.result(timeout)
            except TimeoutError:
                if self._leave(caller):
                    raise _full(timeout) from None
            except BaseException:
                self._give_up(caller)
                raise
        self._enter(pending)

    async def put_async(self, pending: Pending, timeout: float | None) -> None:
        """``put`` for a coroutine: it waits without holding up the loop."""
        caller = self._reserve(wait=timeout != 0)
        if caller is not None:
            try:
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(caller)), timeout)
            except TimeoutError:
                if self._leave(caller):
                    raise _full(timeout) from None
            except BaseException:
                self._give_up(caller)
                raise
        self._enter(pending)

    def _reserve(self, *, wait: bool) -> Future[None] | None:
        """Take a slot; where there is none, a future that has a result when there is."""
        with self._changed:
            self._require_open()
            if self._free and not self._callers:
                self._free -= 1
                return None
            if not wait:
                raise _full(0)
            caller: Future[None] = Future()
            self._callers.append(caller)
            return caller

    def _leave(self, caller: Future[None]) -> bool:
        """Stop waiting for a slot; False when it was given in the meantime."""
        with self._changed:
            if caller.done():
                return False
            self._callers.remove(caller)
            return True

    def _give_up(self, caller: Future[None]) -> None:
        """Stop waiting for a slot, and give it back if it is there."""
        if not self._leave(caller) and caller.exception() is None:
            with self._changed:
                self._release(1)

    def _enter(self, pending: Pending) -> None:
        with self._changed:
            if self.closed:
                self._release(1)
                self._require_open()
            pending.number, pending.arrival = next(self._numbers), time.monotonic()
            self._pending[pending.number] = pending
            self.policy.add(
                Request(
                    pending.number,
                    pending.key,
                    pending.rows,
                    pending.arrival,
                    pending.client,
                    pending.priority,
                    pending.arrival + pending.patience,
                )
            )
            if self.policy.wake() < self._wake:  # most requests change nothing about when to look again
                self._changed.notify()

    def discard(self, number: int) -> bool:
        """Take a request out that was cancelled; False when it has left already."""
        with self._changed:
            if not self.policy.remove(number):
                return False
            del self._pending[number]
            self._release(1)
            if self.closed:
                self._changed.notify()
            return True

    # The thread that serves

    def take(self) -> tuple[list[Pending], list[Pending]] | None:
        """Wait for something to do: a batch, and requests whose deadline has passed; None at the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                late, batch = self.policy.expire(now), self.policy.next(now)
                if late or batch:
                    self._wake = -math.inf
                    self._release(len(late) + len(batch))
                    return self._leaving(batch), self._leaving(late)
                if self.closed and not len(self.policy):
                    return None
                self._wake = self.policy.wake()
                self._changed.wait(None if self._wake == math.inf else max(0.0, self._wake - now))

    def observe(self, key: Hashable, seconds: float) -> None:
        """Learn how long a batch took."""
        with self._changed:
            self.policy.observe(key, seconds)

    def stop_batching(self) -> None:
        """Hand out requests one by one from now on, at once."""
        with self._changed:
            self.policy.rules = Rules(1, 0.0)

    def close(self, *, drain: bool) -> list[Pending]:
        """Let nobody in any more; returns the requests that were taken out, all of them but to drain."""
        with self._changed:
            self.closed = self.policy.draining = True
            while self._callers:
                self._callers.popleft().set_exception(_closed())
            taken = [] if drain else list(self._pending.values())
            if not drain:
                self._pending.clear()
                self.policy = BatchingPolicy(self.policy.rules)
            self._changed.notify_all()
            return taken

    def _leaving(self, requests: Sequence[Request]) -> list[Pending]:
        return [self._pending.pop(request.number) for request in requests]

    def _release(self, slots: int) -> None:
        for _ in range(slots):
            if self._callers:
                self._callers.popleft().set_result(None)
            else:
                self._free += 1

    def _require_open(self) -> None:
        if self.closed:
            raise _closed()


def _full(timeout: float | None) -> QueueFullError:
    waited = f" and stayed so for {timeout:g} s" if timeout else ""
    return QueueFullError(
        f"the session's queue is full{waited}", hint="ask again later, or make the session with a larger one"
    )


def _closed() -> SessionClosedError:
    return SessionClosedError("the session is closed")


def late(pending: Pending) -> DeadlineError:
    """The error of a request whose deadline passed."""
    return DeadlineError(
        f"the request waited {1e3 * (time.monotonic() - pending.arrival):.0f} ms; its deadline was"
        f" {1e3 * pending.patience:.0f} ms"
    )
