"""Which shapes get a bucket, and which one makes room."""

from __future__ import annotations

from graphopt.runtime.buckets import Buckets


def serve(buckets: Buckets[str], key: str) -> bool:
    """One call; True when a bucket served it."""
    if buckets.find(key) is not None:
        return True
    if buckets.earns(key):
        buckets.room()
        buckets.add(key, key.upper())
    return False


def test_a_key_gets_a_bucket_when_it_comes_a_second_time() -> None:
    buckets: Buckets[str] = Buckets(2)
    assert [serve(buckets, "a") for _ in range(3)] == [False, False, True]
    assert buckets.values() == ["A"]
    assert [serve(buckets, key) for key in "bcd"] == [False, False, False]
    assert buckets.values() == ["A"]


def test_the_least_recently_used_one_makes_room() -> None:
    buckets: Buckets[str] = Buckets(2)
    for key in "aabba":
        serve(buckets, key)
    for key in "cc":
        serve(buckets, key)
    assert buckets.values() == ["A", "C"]
    assert buckets.dropped == 1


def test_more_keys_in_turn_than_buckets_do_not_drive_each_other_out() -> None:
    buckets: Buckets[str] = Buckets(3)
    served = [serve(buckets, key) for _ in range(10) for key in "abcd"]
    assert buckets.dropped == 0
    assert buckets.values() == ["A", "B", "C"]
    assert sum(served) == 3 * 8  # from their third round on


def test_a_key_that_comes_twice_between_two_uses_of_the_oldest_takes_its_place() -> None:
    buckets: Buckets[str] = Buckets(1)
    for key in "aa":
        serve(buckets, key)
    for key in "bab":  # a was used in between
        serve(buckets, key)
    assert buckets.values() == ["A"]
    serve(buckets, "b")
    assert buckets.values() == ["B"]


def test_what_came_once_is_forgotten_at_last() -> None:
    buckets: Buckets[str] = Buckets(1)
    buckets.earns("first")
    for number in range(2000):
        assert not buckets.earns(str(number))
    assert not buckets.earns("first")
