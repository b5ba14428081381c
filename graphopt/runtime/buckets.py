"""Buckets: something dear to make for a shape, kept for the shapes that come again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_REMEMBERED = 1024  # keys that have no bucket, and when they came last


class Buckets(Generic[T]):
    """As many values as the limit allows, by key; the least recently used one makes room.

    A key earns a bucket by coming a second time. When all are taken it must have come twice since the one
    that would make room was used: with more shapes in turn than buckets, the least recently used one is
    always the next to be needed, and every call would make one in vain.

    Args:
        limit: how many values are kept, at least one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._used: dict[Hashable, int] = {}
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._now = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def kept(self) -> list[Any]:
        """The keys of what is kept, the least recently used first."""
        return list(self._values)

    def values(self) -> list[T]:
        """What is kept, in the same order."""
        return list(self._values.values())

    def find(self, key: Hashable) -> T | None:
        """The value of a key, which counts as a use; None when it has none."""
        value = self._values.get(key)
        if value is not None:
            self._now += 1
            self._values.move_to_end(key)
            self._used[key] = self._now
        return value

    def earns(self, key: Hashable) -> bool:
        """Whether a key without a value should get one now; asking counts as its coming."""
        self._now += 1
        before = self._seen.pop(key, None)
        self._seen[key] = self._now
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        if before is None or len(self._values) < self.limit:
            return before is not None
        return before > self._used[next(iter(self._values))]

    def room(self) -> T | None:
        """Take out the least recently used value when all buckets are taken, and return it."""
        if len(self._values) < self.limit:
            return None
        key, value = self._values.popitem(last=False)
        del self._used[key]
        self.dropped += 1
        return value

    def add(self, key: Hashable, value: T) -> None:
        """Keep a value; ``room`` was called before, so that there is one for it."""
        self._now += 1
        self._values[key] = value
        self._used[key] = self._now
        self._seen.pop(key, None)
