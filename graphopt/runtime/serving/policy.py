"""Which requests form the next batch, and when to wait: no threads, no clock of its own, no tensors.

Requests of one key (a length bucket) may share a batch. A key is due when it can fill a batch, when its
oldest request has waited long enough, or when a deadline could not be kept by waiting. Of the keys that are
due, the one whose first request comes first is served. Requests come in the order of their priority, and
within a priority in that of start-time fair queueing (Goyal, Vin, Cheng: Start-time fair queueing, IEEE/ACM
Transactions on Networking, 1997), which gives every client that has work an equal share of the rows: a
request's tag is the work that its client has asked for, and a client that comes back starts at the tag that
is being served, so that nobody saves up a claim and nobody pays for having been alone.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

_EXPECTED = 256  # keys whose batch time is remembered
_RECENT = 0.2  # the weight of the newest batch in it

Place = tuple[int, float, int]  # in the order of service: priority (negative), tag, number


@dataclass(frozen=True, slots=True)
class Request:
    """What the policy knows of a request.

    Args:
        number: unique; later requests have larger ones.
        key: only requests of equal keys share a batch.
        rows: how much of a batch it takes, at least 1.
        arrival: when it came, in seconds.
        client: who asks; every client gets an equal share.
        priority: larger ones go first.
        deadline: when it is of no use any more, in seconds.
    """

    number: int
    key: Hashable
    rows: int
    arrival: float
    client: str = ""
    priority: int = 0
    deadline: float = math.inf


@dataclass(frozen=True)
class Rules:
    """How batches are formed.

    Args:
        max_batch: rows of a batch, at most.
        max_wait: seconds that a request waits for others while nothing else holds it up, at most.
    """

    max_batch: int
    max_wait: float


@dataclass
class _Bucket:
    """The waiting requests of one key.

    Args:
        waiting: by number, in order of arrival.
        order: in order of service.
        deadlines: a heap of (deadline, number); those of requests that are gone stay until they come up.
        rows: of all of them.
    """

    waiting: dict[int, tuple[Request, Place]] = field(default_factory=dict)
    order: list[Place] = field(default_factory=list)
    deadlines: list[tuple[float, int]] = field(default_factory=list)
    rows: int = 0

    def add(self, request: Request, tag: float) -> None:
        place = (-request.priority, tag, request.number)
        self.waiting[request.number] = request, place
        insort(self.order, place)
        self.rows += request.rows
        if request.deadline < math.inf:
            heapq.heappush(self.deadlines, (request.deadline, request.number))

    def remove(self, number: int) -> Request:
        request, place = self.waiting.pop(number)
        del self.order[bisect_left(self.order, place)]
        self.rows -= request.rows
        if len(self.deadlines) > 2 * len(self.waiting) + 8:  # most are of requests that were served
            self.deadlines = [entry for entry in self.deadlines if entry[1] in self.waiting]
            heapq.heapify(self.deadlines)
        return request

    def oldest(self) -> float:
        """The arrival of the request that came first."""
        return next(iter(self.waiting.values()))[0].arrival

    def deadline(self) -> float:
        """The earliest deadline."""
        while self.deadlines and self.deadlines[0][1] not in self.waiting:
            heapq.heappop(self.deadlines)
        return self.deadlines[0][0] if self.deadlines else math.inf


class BatchingPolicy:
    """The waiting requests, and what becomes of them.

    Args:
        rules: how batches are formed.

    Attributes:
        draining: nobody waits for others any more: what is there is due.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.draining = False
        self._buckets: dict[Hashable, _Bucket] = {}
        self._keys: dict[int, Hashable] = {}
        self._served = 0.0  # the tag that is being served
        self._asked: dict[str, float] = {}  # by client, the tag of its next request
        self._expected: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, request: Request) -> None:
        """Let a request wait; it takes no more rows than a batch has."""
        tag = max(self._served, self._asked.get(request.client, 0.0))
        self._asked[request.client] = tag + request.rows
        self._buckets.setdefault(request.key, _Bucket()).add(request, tag)
        self._keys[request.number] = request.key

    def remove(self, number: int) -> bool:
        """Forget a request, and that its client asked for it; False when it does not wait any more."""
        if number not in self._keys:
            return False
        request = self._take(number)
        if request.client in self._asked:
            left = self._asked[request.client] - request.rows
            self._asked[request.client] = max(left, self._served)
        return True

    def expire(self, now: float) -> list[Request]:
        """Take out the requests whose deadline has passed."""
        late = []
        for bucket in list(self._buckets.values()):
            while bucket.waiting and bucket.deadline() <= now:
                late.append(self._take(bucket.deadlines[0][1]))
        return late

    def next(self, now: float) -> list[Request]:
        """Take out the next batch, in order of service; empty while waiting is better."""
        due = [bucket for key, bucket in self._buckets.items() if self._due(key, bucket) <= now]
        if not due:
            return []
        bucket = min(due, key=lambda bucket: bucket.order[0])
        rows, chosen, tag = 0, [], self._served
        for place in bucket.order:
            request = bucket.waiting[place[2]][0]
            if chosen and rows + request.rows > self.rules.max_batch:
                break  # what comes first goes first: nothing small overtakes it
            chosen.append(request.number)
            rows, tag = rows + request.rows, max(tag, place[1])
        self._served = tag
        return [self._take(number) for number in chosen]

    def wake(self) -> float:
        """When there is something to do, in seconds: a batch that is due, or a deadline; inf for never."""
        times = (min(self._due(key, b), b.deadline()) for key, b in self._buckets.items())
        return min(times, default=math.inf)

    def observe(self, key: Hashable, seconds: float) -> None:
        """Learn how long a batch of a key takes, to keep deadlines."""
        known = self._expected.pop(key, seconds)
        self._expected[key] = known + _RECENT * (seconds - known)
        if len(self._expected) > _EXPECTED:
            self._expected.popitem(last=False)

    def _due(self, key: Hashable, bucket: _Bucket) -> float:
        if self.draining or bucket.rows >= self.rules.max_batch:
            return -math.inf
        in_time = bucket.deadline() - self._expected.get(key, 0.0)
        return min(bucket.oldest() + self.rules.max_wait, in_time)

    def _take(self, number: int) -> Request:
        key = self._keys.pop(number)
        bucket = self._buckets[key]
        request = bucket.remove(number)
        if not bucket.waiting:
            del self._buckets[key]
        if not self._keys:  # nobody waits: nobody is ahead of anybody
            self._asked.clear()
        elif len(self._asked) > 2 * len(self._keys) + 64:
            self._asked = {client: tag for client, tag in self._asked.items() if tag > self._served}
        return request
