"""A session: a model that many threads call at once, and that runs their requests in batches."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch

from graphopt.errors import InputError, QueueFullError, SessionClosedError, SessionError, said
from graphopt.runtime.serving import streams
from graphopt.runtime.serving.batcher import Batcher
from graphopt.runtime.serving.policy import Rules
from graphopt.runtime.serving.queue import Pending, RequestQueue, late
from graphopt.runtime.serving.stats import Stats


@dataclass(frozen=True)
class Face:
    """How a model is called.

    Args:
        flatten: the flat tensors of a call; raises InputError where it does not fit the model.
        unflatten: the model's output type around flat outputs.
        device: that its tensors are on.
    """

    flatten: Callable[[tuple[Any, ...], dict[str, Any]], list[torch.Tensor]]
    unflatten: Callable[[Sequence[Any]], Any]
    device: torch.device


@dataclass(frozen=True)
class Manners:
    """How somebody asks.

    Args:
        client: who; every client gets an equal share of the batches.
        priority: larger ones go first.
        deadline_ms: after so long an answer is of no use any more; None for never.
        timeout_s: how long to wait for room in the queue, in seconds; None for as long as it takes, 0 for
            not at all.
    """

    client: str = ""
    priority: int = 0
    deadline_ms: float | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("deadline_ms", self.deadline_ms), ("timeout_s", self.timeout_s)):
            if value is not None and not value >= 0:
                raise InputError(f"{name}={value} is no time", hint="0 or above, or None")


class _Server:
    """The queue, and the thread that empties it. The thread keeps no session alive."""

    def __init__(self, batcher: Batcher, face: Face, rules: Rules, queue_size: int) -> None:
        self.batcher, self.face = batcher, face
        self.queue = RequestQueue(rules, queue_size)
        self.stats = Stats()
        self._death: BaseException | None = None
        self._running: list[Pending] = []
        self._thread = threading.Thread(target=self._work, name="graphopt-session", daemon=True)
        self._thread.start()

    def pending(self, manners: Manners, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pending:
        """A request, checked.

        Raises:
            InputError: it is not what the model was optimized for.
            SessionError: the session is broken.
        """
        if self._death is not None:
            raise self._dead()
        tensors = [tensor.detach() for tensor in self.face.flatten(args, kwargs)]
        key, rows = self.batcher.key(tensors)
        patience = math.inf if manners.deadline_ms is None else manners.deadline_ms / 1e3
        origin = streams.origin(self.face.device)
        return Pending(tensors, key, rows, manners.client, manners.priority, patience, origin)

    def admitted(self, pending: Pending) -> Future[Any]:
        """The future of a request that is in the queue; cancelling it takes the request out.

        What the future calls then knows the request's number alone: it must not keep its tensors.
        """
        reference, number = weakref.ref(self), pending.number

        def left(future: Future[Any]) -> None:
            server = reference() if future.cancelled() else None
            if server is not None and server.queue.discard(number):
                server.stats.count("cancelled")

        pending.future.add_done_callback(left)
        return pending.future

    def close(self, *, drain: bool, timeout: float | None = None) -> None:
        """Let nobody in, serve or turn away who waits, and end the thread."""
        self._refuse(self.queue.close(drain=drain), lambda: SessionClosedError("the session was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise SessionError(f"the session still runs a batch after {timeout:g} s")

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self._death = error
            for pending in self._running:
                if not pending.future.done():
                    self.stats.count("failed")
                    pending.future.set_exception(self._dead())
            self._refuse(self.queue.close(drain=False), self._dead, "failed")

    def _turn(self) -> bool:
        """Wait for something to do, and do it; False at the end."""
        taken = self.queue.take()
        if taken is None:
            return False
        batch, expired = taken
        for pending in expired:
            self._refuse([pending], partial(late, pending), "expired")
        self._running = [pending for pending in batch if pending.future.set_running_or_notify_cancel()]
        self.stats.count("cancelled", len(batch) - len(self._running))
        if self._running:
            self._serve(self._running)
        self._running = []
        return True

    def _serve(self, batch: Sequence[Pending]) -> None:
        start = time.monotonic()
        streams.wait_for(pending.origin for pending in batch)
        answers = self.batcher.serve([pending.tensors for pending in batch])
        answers = streams.settled(self.face.device, [pending.origin for pending in batch], answers)
        took = time.monotonic() - start
        self.queue.observe(batch[0].key, took)
        if not self.batcher.joins:
            self.queue.stop_batching()
        waits = [start - pending.arrival for pending in batch]
        self.stats.batch(sum(pending.rows for pending in batch), took, waits)
        for pending, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                self.stats.count("failed")
                pending.future.set_exception(answer)
            else:
                self.stats.count("answered")
                pending.future.set_result(self.face.unflatten(answer))

    def _dead(self) -> SessionError:
        assert self._death is not None
        error = SessionError(
            f"the session's thread died: {said(self._death)}", hint="close it, and make another one"
        )
        error.__cause__ = self._death
        return error

    def _refuse(
        self, turned_away: Sequence[Pending], error: Callable[[], Exception], kind: str = "refused"
    ) -> None:
        for pending in turned_away:
            if pending.future.set_running_or_notify_cancel():
                self.stats.count(kind)
                pending.future.set_exception(error())
            else:
                self.stats.count("cancelled")


class Client:
    """Somebody who asks a session: called like the model, from any thread.

    Made by ``Session.client``; a session is a client itself.
    """

    def __init__(self, server: _Server, manners: Manners, session: Session | None = None) -> None:
        self._server = server
        self._manners = manners
        self._session = session  # which would close if nobody held it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask, and wait for the answer.

        Args:
            args: as for the model; they must not change until the answer is there.
            kwargs: likewise.

        Returns:
            What the model returns.

        Raises:
            InputError: the request is not what the model was optimized for.
            QueueFullError: there is no room in the queue.
            DeadlineError: the deadline passed before its turn came.
            SessionClosedError: the session is closed.
            SessionError: the session's thread died.
        """
        future = self.submit(*args, **kwargs)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # somebody pressed Ctrl-C; does nothing where the answer is an error
            raise
        finally:
            del future  # an error's traceback holds this frame, and would hold the error

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Ask; the future has the answer. Cancelling it before its turn takes the request out.

        Waits for room in the queue; raises as a call does, but for what becomes of the request later.
        """
        pending = self._server.pending(self._manners, args, kwargs)
        try:
            self._server.queue.put(pending, self._manners.timeout_s)
        except QueueFullError:
            self._server.stats.count("refused")
            raise
        return self._server.admitted(pending)

    async def ask(self, *args: Any, **kwargs: Any) -> Any:
        """``await session.ask(...)``: as a call, without holding up the loop; cancelling takes it out."""
        pending = self._server.pending(self._manners, args, kwargs)
        try:
            await self._server.queue.put_async(pending, self._manners.timeout_s)
        except QueueFullError:
            self._server.stats.count("refused")
            raise
        return await asyncio.wrap_future(self._server.admitted(pending))


class Session(Client):
    """A model that serves many threads: their requests run in batches.

    Made by ``OptimizedModel.session``, whose documentation says what the arguments mean. It is a context
    manager: leaving the block serves who waits, and leaving it by an exception turns them away.

    Args:
        batcher: runs requests together.
        face: how the model is called.
        max_wait_ms: how long a request waits for others.
        queue_size: requests that wait, at most.
        manners: of requests that are asked for without a client.
    """

    def __init__(
        self, batcher: Batcher, face: Face, *, max_wait_ms: float, queue_size: int, manners: Manners
    ) -> None:
        rules = Rules(batcher.max_batch, max_wait_ms / 1e3 if batcher.joins else 0.0)
        super().__init__(_Server(batcher, face, rules, queue_size), manners)
        self._close_at_exit = weakref.finalize(self, _abandon, self._server)

    def client(
        self,
        name: str,
        *,
        priority: int = 0,
        deadline_ms: float | None = None,
        timeout_s: float | None = None,
    ) -> Client:
        """Somebody who asks, with a share of the batches of its own.

        Args:
            name: clients of one name are one.
            priority: larger ones go first; among equals every client gets an equal share.
            deadline_ms: after so long, counted from its entering the queue, a request of which the turn has
                not come is given up; batches are closed early to keep it.
            timeout_s: seconds to wait for room in the queue; 0 raises at once, None waits.
        """
        return Client(self._server, Manners(name, priority, deadline_ms, timeout_s), self)

    @property
    def closed(self) -> bool:
        """True when nobody is let in any more."""
        return self._server.queue.closed

    @property
    def remarks(self) -> list[str]:
        """What the session found out about the model, in words: why it does not batch, or does not pad."""
        return list(self._server.batcher.remarks)

    def stats(self) -> dict[str, Any]:
        """JSON-ready counts and times.

        ``queued`` now; ``answered``, ``failed``, ``expired``, ``cancelled``, ``refused`` requests and
        ``batches``, all since the start; ``batch_rows`` (batches by their rows); ``wait_ms`` and
        ``batch_ms`` (median, p99 and max of the last 2048); ``padding``, the share of positions run that
        were padding; ``remarks``.
        """
        padded, positions = self._server.batcher.padded
        return {
            "queued": len(self._server.queue),
            **self._server.stats.to_dict(),
            "padding": round(padded / positions, 4) if positions else 0.0,
            "remarks": self.remarks,
        }

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """End the session.

        Args:
            drain: serve who waits; otherwise they get SessionClosedError. What runs is always finished.
            timeout: seconds to wait for that; None for as long as it takes.

        Raises:
            SessionError: a batch still runs after ``timeout``.
        """
        self._server.close(drain=drain, timeout=timeout)
        self._close_at_exit.detach()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)


def _abandon(server: _Server) -> None:
    """Close the server of a session that nobody holds any more, or that the process leaves behind."""
    server.close(drain=False)
