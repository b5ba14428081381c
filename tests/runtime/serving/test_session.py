"""Sessions: threads, futures and coroutines; failures, deadlines, cancellation, back-pressure, closing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from graphopt.errors import (
    DeadlineError,
    InputError,
    QueueFullError,
    SessionClosedError,
    SessionError,
)
from graphopt.runtime.serving.session import Session
from tests.runtime.serving._cheap import Gate, doubled, numbers, session


@pytest.fixture(autouse=True)
def _no_thread_is_leaked() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def held(gate: Gate, **options: Any) -> tuple[Session, Future[Any]]:
    """A session whose thread is busy with a first request."""
    made = session(gate, **options)
    first = made.submit(numbers(0))
    assert gate.entered.wait(30)
    return made, first


# Asking


def test_threads_get_their_own_answers() -> None:
    with session(max_wait_ms=1) as made, ThreadPoolExecutor(16) as threads:
        answers = threads.map(lambda n: made(numbers(*range(n, n + n % 7 + 1))), range(300))
        for n, answer in enumerate(answers):
            assert answer.tolist() == [[2.0 * value for value in range(n, n + n % 7 + 1)]]
        stats = made.stats()
    assert stats["answered"] == 300
    assert stats["queued"] == 0
    assert sum(rows * count for rows, count in stats["batch_rows"].items()) == 300


def test_what_waits_together_runs_together() -> None:
    gate = Gate()
    made, first = held(gate)
    futures = [made.submit(numbers(*range(1, n + 1))) for n in (3, 4, 2, 5)]
    gate.open.set()
    assert [future.result(10).shape[1] for future in futures] == [3, 4, 2, 5]
    assert gate.calls == [(1, 1), (3, 4), (1, 5)]  # one bucket up to 4, the next up to 8
    assert first.result().tolist() == [[0]]
    assert made.stats()["padding"] == pytest.approx(3 / 18, abs=1e-4)
    made.close()


def test_answers_have_memory_of_their_own() -> None:
    gate = Gate()
    made, _ = held(gate)
    one, two = made.submit(numbers(1, 2)), made.submit(numbers(3, 4))
    gate.open.set()
    one.result(10).zero_()
    assert two.result(10).tolist() == [[6, 8]]
    assert one.result().untyped_storage().nbytes() == 16  # two integers, not the batch
    made.close()


def test_coroutines() -> None:
    async def ask(made: Session) -> list[Any]:
        return await asyncio.gather(*(made.ask(numbers(n)) for n in range(40)))

    with session(max_wait_ms=1, queue_size=4) as made:  # they wait for room, too
        assert [answer.item() for answer in asyncio.run(ask(made))] == [2 * n for n in range(40)]


def test_a_full_batch_does_not_wait() -> None:
    with session(max_wait_ms=60_000, max_batch=4) as made:
        futures = [made.submit(numbers(n)) for n in range(4)]
        assert [future.result(10).item() for future in futures] == [0, 2, 4, 6]


# Failures


def test_a_request_that_fails_does_not_take_its_batch_down() -> None:
    gate = Gate()
    made, _ = held(gate, max_batch=16)
    futures = [made.submit(numbers(n)) for n in (1, 2, -3, 4, 5, -6, 7)]
    gate.open.set()
    for n, future in zip((1, 2, -3, 4, 5, -6, 7), futures, strict=True):
        if n < 0:
            with pytest.raises(ValueError, match="a negative number"):
                future.result(10)
        else:
            assert future.result(10).item() == 2 * n
    assert made.stats()["failed"] == 2
    made.close()


def test_a_request_with_too_many_rows_is_refused_alone() -> None:
    with session(max_batch=2) as made:
        with pytest.raises(InputError, match="3 rows; the session takes 1 to 2"):
            made(torch.ones(3, 2))
        with pytest.raises(InputError, match="0 rows"):
            made(torch.ones(0, 2))
        assert made(torch.ones(2, 2)).shape == (2, 2)


def test_a_thread_that_dies_answers_everybody() -> None:
    def exits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        raise SystemExit("the program left")

    gate = Gate(exits)
    made, first = held(gate)
    others = [made.submit(numbers(n)) for n in range(3)]
    gate.open.set()
    for future in (first, *others):
        with pytest.raises(SessionError, match="the session's thread died: SystemExit: the program left"):
            future.result(10)
    with pytest.raises(SessionError, match="thread died"):
        made(numbers(1))
    made.close()


def test_a_policy_that_fails_answers_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    made, first = held(gate)
    waiting = made.submit(numbers(1))
    monkeypatch.setattr(made._server.queue.policy, "next", lambda now: 1 / 0)
    gate.open.set()
    assert first.result(10).item() == 0
    with pytest.raises(SessionError, match="ZeroDivisionError"):
        waiting.result(10)
    made.close()


# Deadlines and cancellation


def test_a_deadline() -> None:
    gate = Gate()
    made, _ = held(gate)
    late = made.client("hasty", deadline_ms=1).submit(numbers(1))
    other = made.submit(numbers(2))
    time.sleep(0.01)
    gate.open.set()
    with pytest.raises(DeadlineError, match="its deadline was 1 ms"):
        late.result(10)
    assert other.result(10).item() == 4
    assert made.stats()["expired"] == 1
    made.close()


def test_a_cancelled_request_leaves_the_queue_and_gives_its_slot_back() -> None:
    gate = Gate()
    made, first = held(gate, queue_size=1)
    future = made.submit(numbers(1))
    assert future.cancel()
    again = made.client("b", timeout_s=0).submit(numbers(2))
    assert not first.cancel()  # it runs
    gate.open.set()
    assert again.result(10).item() == 4
    assert made.stats()["cancelled"] == 1
    with pytest.raises(CancelledError):
        future.result()
    made.close()


def test_a_cancelled_coroutine_leaves_the_queue() -> None:
    async def give_up(made: Session) -> None:
        task = asyncio.create_task(made.ask(numbers(1)))
        waits = asyncio.create_task(made.ask(numbers(2)))  # for room: the queue has one slot
        await asyncio.sleep(0.01)
        task.cancel()
        waits.cancel()
        assert [type(end) for end in await asyncio.gather(task, waits, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 2

    gate = Gate()
    made, _ = held(gate, queue_size=1)
    asyncio.run(give_up(made))
    left = made.client("b", timeout_s=0).submit(numbers(3))  # the slot is free again
    gate.open.set()
    assert left.result(10).item() == 6
    assert gate.calls == [(1, 1), (1, 1)]
    made.close()


# Back-pressure and order


def test_a_full_queue_raises_at_once_or_after_a_time() -> None:
    gate = Gate()
    made, _ = held(gate, queue_size=2)
    waiting = [made.submit(numbers(n)) for n in range(2)]
    with pytest.raises(QueueFullError, match="the session's queue is full"):
        made.client("hasty", timeout_s=0)(numbers(9))
    with pytest.raises(QueueFullError, match=r"stayed so for 0\.01 s"):
        made.client("patient", timeout_s=0.01)(numbers(9))
    with pytest.raises(QueueFullError):
        asyncio.run(made.client("async", timeout_s=0.01).ask(numbers(9)))
    assert made.stats()["refused"] == 3
    blocked = threading.Thread(target=lambda: waiting.append(made.submit(numbers(7))))
    blocked.start()
    gate.open.set()
    blocked.join(10)
    assert [future.result(10).item() for future in waiting] == [0, 2, 14]
    made.close()


def test_priorities_and_shares() -> None:
    gate = Gate()
    made, _ = held(gate, max_batch=2)
    order: list[str] = []
    for name, priority, count in (("flood", 0, 6), ("other", 0, 2), ("urgent", 1, 2)):
        client = made.client(name, priority=priority)
        for _ in range(count):
            client.submit(numbers(1)).add_done_callback(lambda _, name=name: order.append(name))
    gate.open.set()
    made.close()
    assert order[:2] == ["urgent", "urgent"]
    assert sorted(order[2:6]) == ["flood", "flood", "other", "other"]


# Closing


def test_leaving_the_block_serves_who_waits() -> None:
    gate = Gate()
    made, first = held(gate, max_wait_ms=60_000, max_batch=1)
    with made:
        futures = [made.submit(numbers(n)) for n in range(5)]
        gate.open.set()
    assert all(future.done() for future in (first, *futures))
    assert [future.result().item() for future in futures] == [0, 2, 4, 6, 8]
    assert made.closed


def test_an_exception_in_the_block_turns_away_who_waits() -> None:
    gate = Gate()
    made, first = held(gate)
    waiting = made.submit(numbers(1))
    threading.Timer(0.05, gate.open.set).start()
    with pytest.raises(KeyError), made:
        raise KeyError
    with pytest.raises(SessionClosedError):
        waiting.result()
    assert first.result().item() == 0


def test_a_closed_session_lets_nobody_in_and_wakes_who_waits_for_room() -> None:
    gate = Gate()
    made, _ = held(gate, queue_size=1)
    made.submit(numbers(1))
    raised: list[type[Exception]] = []

    def blocked() -> None:
        try:
            made(numbers(2))
        except SessionClosedError as error:
            raised.append(type(error))

    thread = threading.Thread(target=blocked)
    thread.start()
    while not made._server.queue._callers:
        time.sleep(0.001)
    with pytest.raises(SessionError, match=r"still runs a batch after 0\.01 s"):
        made.close(drain=False, timeout=0.01)
    thread.join(10)
    assert raised == [SessionClosedError]
    gate.open.set()
    made.close()
    made.close()  # again does nothing
    with pytest.raises(SessionClosedError):
        made(numbers(1))


def test_a_session_that_nobody_holds_ends_its_thread() -> None:
    client = session().client("a")
    assert client(numbers(1)).item() == 2  # a client holds its session
    del client  # the fixture looks for the thread


@pytest.mark.parametrize("options", [{"deadline_ms": -1}, {"timeout_s": float("nan")}])
def test_times_that_are_none(options: dict[str, float]) -> None:
    with session() as made, pytest.raises(InputError, match="is no time"):
        made.client("a", **options)


# All of it at once


def storm(made: Session, requests: int, threads: int, seed: int = 0) -> Counter[str]:
    """Random requests of many threads, some cancelled, late or failing; every answer is checked.

    Returns:
        How many ended how: every request is counted once.
    """
    ends: Counter[str] = Counter()
    lock = threading.Lock()

    def ended(number: int, length: int, future: Future[Any]) -> None:
        if future.cancelled():
            kind = "cancelled"
        elif isinstance(future.exception(), DeadlineError):
            kind = "expired"
        elif isinstance(future.exception(), ValueError):
            kind = "failed"
            assert number % 97 == 0
        else:
            kind = "answered"
            expected = 2 * (number + torch.arange(length, dtype=torch.float64))
            assert torch.equal(future.result()[0], expected), "another's result"
        with lock:
            ends[kind] += 1

    def ask(worker: int) -> None:
        draw = random.Random(seed * threads + worker)
        futures = []
        for number in range(worker, requests, threads):
            length = draw.randrange(1, 17)
            x = number + torch.arange(length, dtype=torch.float64)[None]
            x = -1 - x if number % 97 == 0 else x
            hurry = draw.choice([None, None, None, 0.5])
            client = made.client(f"client {worker}", priority=draw.randrange(3), deadline_ms=hurry)
            futures.append((number, length, client.submit(x)))
            if draw.random() < 0.1:
                draw.choice(futures)[2].cancel()
        for number, length, future in futures:
            with contextlib.suppress(CancelledError):
                future.exception(60)
            ended(number, length, future)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))
    return ends


def test_thousands_of_random_requests_each_end_once_and_right() -> None:
    with session(max_batch=16, max_wait_ms=0.2, queue_size=128) as made:
        ends = storm(made, 5000, 8)
        stats = made.stats()
    assert ends.total() == 5000
    assert ends["failed"] > 0 and ends["cancelled"] > 0 and ends["answered"] > 2500
    assert {kind: stats[kind] for kind in ends} == dict(ends)
    assert stats["queued"] == 0


def test_memory_is_flat() -> None:
    def wave(made: Session) -> int:
        for n in range(400):
            made(torch.full((1, 16), float(n)))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        with session() as made:
            made._server.stats._waits = type(made._server.stats._waits)(maxlen=16)
            made._server.stats._batches = type(made._server.stats._batches)(maxlen=16)
            wave(made)
            before = wave(made)
            assert wave(made) - before < 20_000  # 50 bytes a request
    finally:
        tracemalloc.stop()


def test_nothing_holds_an_answer_but_who_asked() -> None:
    import weakref

    gc.disable()  # cycles would keep tensors until the collector comes
    try:
        with session(doubled) as made:
            answer = made(numbers(1, 2, 3))
            reference = weakref.ref(answer)
            del answer
            made(numbers(0))  # the thread has let go of the batch before
            assert reference() is None
    finally:
        gc.enable()


def test_a_program_sees_batches_only_within_the_limit() -> None:
    sizes: list[int] = []

    def counting(tensors: list[torch.Tensor]) -> Sequence[Any]:
        sizes.append(tensors[0].shape[0])
        return doubled(tensors)

    with session(counting, max_batch=4, max_wait_ms=1) as made, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: made(torch.ones(n % 3 + 1, 2)), range(60)))
    assert max(sizes) <= 4
    assert sum(sizes) == sum(n % 3 + 1 for n in range(60))
