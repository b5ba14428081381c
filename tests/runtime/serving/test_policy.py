"""The policy: which requests form a batch, when it waits, and who comes first."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime.serving.policy import BatchingPolicy, Request, Rules
from graphopt.runtime.serving.simulate import Arrival, Outcome, Trace, simulate

RULES = Rules(max_batch=4, max_wait=1.0)


def policy(*requests: Request, rules: Rules = RULES) -> BatchingPolicy:
    made = BatchingPolicy(rules)
    for request in requests:
        made.add(request)
    return made


def request(number: int, key: Any = "k", rows: int = 1, arrival: float = 0.0, **others: Any) -> Request:
    return Request(number, key, rows, arrival, **others)


def numbers(batch: list[Request]) -> list[int]:
    return [one.number for one in batch]


# When


def test_a_full_batch_goes_at_once() -> None:
    made = policy(*(request(number) for number in range(5)))
    assert made.wake() == -math.inf
    assert numbers(made.next(0.0)) == [0, 1, 2, 3]
    assert made.next(0.0) == []
    assert len(made) == 1


def test_a_batch_that_is_not_full_waits_for_its_oldest() -> None:
    made = policy(request(0, arrival=0.25), request(1, arrival=0.5))
    assert made.wake() == 1.25
    assert made.next(1.2) == []
    assert numbers(made.next(1.25)) == [0, 1]


def test_a_deadline_closes_a_batch_early_by_the_time_that_it_takes() -> None:
    made = policy(request(0), request(1, deadline=0.75))
    made.observe("k", 0.25)
    assert made.wake() == 0.5
    assert numbers(made.next(0.5)) == [0, 1]


def test_what_is_late_is_taken_out() -> None:
    made = policy(request(0, deadline=0.5), request(1, deadline=2.0), request(2))
    assert numbers(made.expire(0.5)) == [0]
    assert made.expire(0.5) == []
    assert numbers(made.next(1.0)) == [1, 2]


def test_nobody_waits_when_draining() -> None:
    made = policy(request(0))
    made.draining = True
    assert numbers(made.next(0.0)) == [0]


# Which


def test_keys_are_not_mixed() -> None:
    made = policy(request(0, "a"), request(1, "b"), request(2, "a"))
    assert numbers(made.next(1.0)) == [0, 2]
    assert numbers(made.next(1.0)) == [1]


def test_rows_are_counted_and_nothing_small_overtakes() -> None:
    made = policy(request(0, rows=3), request(1, rows=2), request(2, rows=1))
    assert numbers(made.next(0.0)) == [0]
    assert numbers(made.next(1.0)) == [1, 2]


def test_priorities_come_first() -> None:
    made = policy(*(request(n, priority=p) for n, p in enumerate((0, 2, 1, 2, 1))))
    assert numbers(made.next(0.0)) == [1, 3, 2, 4]


def test_a_client_that_floods_the_queue_delays_nobody_else() -> None:
    made = policy(*(request(n, client="flood") for n in range(100)))
    made.next(0.0)
    made.add(request(100, client="other"))
    assert 100 in numbers(made.next(0.0))


def test_clients_with_work_get_equal_shares() -> None:
    names = ["a"] * 40 + ["b"] * 10 + ["c"] * 10
    made = policy(*(request(n, client=name) for n, name in enumerate(names)), rules=Rules(6, 1.0))
    served = Counter(one.client for _ in range(5) for one in made.next(0.0))
    assert served == {"a": 10, "b": 10, "c": 10}


def test_a_client_of_another_key_is_not_starved_by_a_flood() -> None:
    made = policy(*(request(n, "long", client="flood") for n in range(100)))
    made.next(0.0)
    made.add(request(100, "short", client="other"))
    for _ in range(3):
        batch = made.next(2.0)
        if numbers(batch) == [100]:
            return
    pytest.fail("the other client was not served")


def test_a_request_that_was_taken_back_costs_its_client_nothing() -> None:
    made = policy(*(request(n, client="a") for n in range(3)))
    assert all(made.remove(number) for number in range(3))
    assert not made.remove(0)
    made.add(request(10, client="b"))
    made.add(request(11, client="a"))
    made.add(request(12, client="b"))
    assert numbers(made.next(1.0)) == [10, 11, 12]


def test_nothing_is_remembered_of_clients_that_are_gone() -> None:
    made = policy()
    for number in range(2000):
        made.add(request(number, client=str(number), deadline=1e9))
        made.add(request(10_000 + number, "other", client="stays"))
        made.next(0.0)
        made.expire(-1.0)
        if number % 4 == 3:
            made.next(1.0)
    assert len(made._asked) < 200
    assert sum(len(bucket.deadlines) for bucket in made._buckets.values()) < 50


# Invariants, on a virtual clock

ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at=st.floats(0, 20),
        key=st.sampled_from(["short", "long"]),
        rows=st.integers(1, 4),
        client=st.sampled_from("abc"),
        priority=st.integers(0, 2),
        patience=st.sampled_from([math.inf, 0.5, 3.0]),
    ),
    min_size=1,
    max_size=60,
)


def batches(trace: Trace) -> dict[float, list[Outcome]]:
    found: dict[float, list[Outcome]] = {}
    for outcome in trace.answered:
        found.setdefault(outcome.start, []).append(outcome)
    return found


@settings(max_examples=50)
@given(ARRIVALS, st.sampled_from([0.0, 0.5, 2.0]))
def test_every_request_ends_once_and_batches_keep_the_rules(arrivals: list[Arrival], max_wait: float) -> None:
    def took(key: Any, rows: int) -> float:
        return 0.1 + 0.05 * rows

    trace = simulate(arrivals, Rules(4, max_wait), took, queue_size=20)
    assert Counter(outcome.arrival for outcome in trace.outcomes) == Counter(arrivals)
    last = -math.inf
    for start, members in sorted(batches(trace).items()):
        assert start >= last  # one at a time
        last = members[0].end
        assert sum(member.arrival.rows for member in members) == members[0].batch <= 4
        assert len({member.arrival.key for member in members}) == 1
        assert last == start + took(None, members[0].batch)
        for member in members:
            assert member.arrival.at <= start < member.arrival.at + member.arrival.patience
    assert trace.busy == pytest.approx(sum(took(None, m[0].batch) for m in batches(trace).values()))
    assert simulate(arrivals, Rules(4, max_wait), took, queue_size=20) == trace


@settings(max_examples=50)
@given(ARRIVALS)
def test_an_idle_server_lets_nobody_wait_longer_than_the_maximum(arrivals: list[Arrival]) -> None:
    trace = simulate(arrivals, Rules(1000, 0.75), lambda key, rows: 0.0)
    for outcome in trace.answered:
        assert outcome.start <= outcome.arrival.at + 0.75 + 1e-9


def test_a_full_queue_refuses() -> None:
    trace = simulate([Arrival(0.0)] * 10, Rules(4, 1.0), lambda key, rows: 1.0, queue_size=6)
    assert Counter(outcome.kind for outcome in trace.outcomes) == {"answered": 6, "refused": 4}


def test_closed_loop_clients() -> None:
    """64 clients, batches of 32: one half runs while the other queues."""

    def again(outcome: Outcome) -> Arrival | None:
        at = outcome.end
        return Arrival(at, client=outcome.arrival.client) if at < 100 else None

    starts = [Arrival(0.0, client=str(client)) for client in range(64)]
    trace = simulate(starts, Rules(32, 0.01), lambda key, rows: 0.5 + rows / 64, after=again)
    assert {outcome.batch for outcome in trace.outcomes} == {32}
    assert trace.throughput() == pytest.approx(32)
    assert trace.percentile(99) == pytest.approx(2.0)
    per_client = Counter(outcome.arrival.client for outcome in trace.outcomes)
    assert max(per_client.values()) - min(per_client.values()) <= 1
