"""Calls of one CUDA graph on several streams: which runs where, and who waits for whom; a pure function.

Branches that depend on each other nowhere can share a GPU that neither fills. Calls that follow one another
without a fork are one task of ``lists.py``, whose schedule places them on streams; what that would take is
then simulated with the GPU shared: calls that run at once and together ask for more of its processors than
there are get slower in proportion. Several streams are taken where that simulation says they pay.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.runtime.scheduling.lists import list_schedule
from graphopt.runtime.scheduling.tasks import Device, Machine, Task, TaskGraph

MOST_STREAMS = 4
HANDOVER_S = 2e-6  # an edge between streams: no dependent launch, and its kernel is started when all are done
WORTH = 0.95  # of the time on one stream that several may take, for them to be chosen


@dataclass(frozen=True)
class Call:
    """A call, as far as streams matter.

    Args:
        name: unique among the calls.
        seconds: that it takes alone; 0 for what runs no kernel.
        share: of the GPU's processors that it keeps busy, 0 to 1.
        reads: names of the calls whose values it reads.
    """

    name: str
    seconds: float
    share: float
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrangement:
    """Which call runs on which stream.

    Args:
        order: of the calls, as they are queued: each after those that it reads.
        stream: of every call; 0 is the stream that all others branch off from, and join at the end.
        waits: by call, those of other streams that its own stream waits for ahead of it; what it is known to
            be behind of already is left out.
        knows: by call, for every stream the place in the order of the last call that is done when it starts,
            -1 for none; of its own stream, its own place.
        seconds: that all take, as simulated.
        in_order: seconds that they take on one stream.
    """

    order: tuple[str, ...]
    stream: Mapping[str, int]
    waits: Mapping[str, tuple[str, ...]]
    knows: Mapping[str, tuple[int, ...]]
    seconds: float
    in_order: float

    @property
    def streams(self) -> int:
        """How many there are."""
        return 1 + max(self.stream.values(), default=0)


def arranged(calls: Sequence[Call], most: int = MOST_STREAMS) -> Arrangement:
    """The calls on as many streams as pay; on one where none but it does.

    Args:
        calls: in topological order.
        most: streams, at most.
    """
    best = on_streams(calls, {call.name: 0 for call in calls}, [call.name for call in calls])
    chain = chains(calls)
    tasks = _tasks(calls, chain)
    if tasks.is_chain:
        return best
    longest = sum(tasks.tasks[name].seconds["stream"] for name in tasks.critical_path("stream"))
    if longest > WORTH * best.in_order:
        return best
    for count in range(2, most + 1):
        devices = tuple(Device(str(stream), "stream") for stream in range(count))
        schedule = list_schedule(tasks, Machine(devices, latency_s=HANDOVER_S))
        place = {placed.task: (placed.start, int(placed.device)) for placed in schedule.placements}
        stream = {call.name: place[chain[call.name]][1] if call.name in chain else 0 for call in calls}
        start = {call.name: place[chain[call.name]][0] if call.name in chain else 0.0 for call in calls}
        found = on_streams(calls, _renumbered(stream), _queued(calls, start))
        if found.streams > 1 and found.seconds < min(WORTH * best.in_order, best.seconds):
            best = found
    return best


def chains(calls: Sequence[Call]) -> dict[str, str]:
    """The first call of the chain that a call belongs to: calls of which each has only the next one after it.

    Calls that run no kernel, as views do, are between others as if they were not there, and belong to the
    chain of the last call that they come from; what comes from none is left out.
    """
    behind: dict[str, list[str]] = {}  # the calls with kernels that a value comes from, in order
    users: dict[str, set[str]] = defaultdict(set)
    place = {call.name: index for index, call in enumerate(calls)}
    chain: dict[str, str] = {}
    for call in calls:
        sources = sorted({name for read in call.reads for name in behind[read]}, key=place.__getitem__)
        behind[call.name] = [call.name] if call.seconds else sources
        if call.seconds:
            for source in sources:
                users[source].add(call.name)
    for call in calls:
        sources = behind[call.name] if not call.seconds else _sources(call, behind)
        if not call.seconds:
            if sources:
                chain[call.name] = chain[sources[-1]]
        elif len(sources) == 1 and users[sources[0]] == {call.name}:
            chain[call.name] = chain[sources[0]]
        else:
            chain[call.name] = call.name
    return chain


def _sources(call: Call, behind: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for read in call.reads for name in behind[read]))


def _tasks(calls: Sequence[Call], chain: Mapping[str, str]) -> TaskGraph:
    """The chains as tasks of a machine whose devices are streams."""
    seconds: dict[str, float] = defaultdict(float)
    reads: dict[str, dict[str, float]] = defaultdict(dict)
    for call in calls:
        if call.name not in chain:
            continue
        own = chain[call.name]
        seconds[own] += call.seconds
        if call.seconds:  # a view waits for nothing by itself
            reads[own].update({chain[r]: 0.0 for r in call.reads if chain.get(r, own) != own})
    return TaskGraph([Task(name, {"stream": took}, reads[name]) for name, took in seconds.items()])


def _renumbered(stream: Mapping[str, int]) -> dict[str, int]:
    """Streams by the order in which calls come to them."""
    numbers = {number: index for index, number in enumerate(dict.fromkeys(stream.values()))}
    return {name: numbers[number] for name, number in stream.items()}


def _queued(calls: Sequence[Call], start: Mapping[str, float]) -> list[str]:
    """The calls by start, each behind those that it reads."""
    users: dict[str, list[str]] = defaultdict(list)
    missing = {call.name: len(set(call.reads)) for call in calls}
    place = {call.name: index for index, call in enumerate(calls)}
    for call in calls:
        for read in set(call.reads):
            users[read].append(call.name)
    ready = [(start[name], place[name], name) for name, count in missing.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, _, name = heapq.heappop(ready)
        order.append(name)
        for user in users[name]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (start[user], place[user], user))
    return order


def on_streams(calls: Sequence[Call], stream: Mapping[str, int], order: Sequence[str]) -> Arrangement:
    """The waits that calls on given streams need, and what they take.

    Args:
        calls: in any order.
        stream: of every call.
        order: of the names, each after those that it reads.
    """
    by_name = {call.name: call for call in calls}
    count = 1 + max(stream.values(), default=0)
    now = [[-1] * count for _ in range(count)]  # by stream, what is done when its next call starts
    place: dict[str, int] = {}
    knows: dict[str, tuple[int, ...]] = {}
    waits: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(order):
        own = now[stream[name]]
        awaited = []
        for read in sorted(set(by_name[name].reads), key=place.__getitem__, reverse=True):
            if own[stream[read]] < place[read]:  # the last first: it stands for those before it
                awaited.append(read)
                own[:] = map(max, own, knows[read])
        own[stream[name]] = place[name] = index
        waits[name], knows[name] = tuple(awaited), tuple(own)
    alone = sum(call.seconds for call in calls)
    took = alone if count == 1 else _simulated(by_name, stream, order, waits)
    return Arrangement(tuple(order), dict(stream), waits, knows, took, alone)


def _simulated(
    calls: Mapping[str, Call],
    stream: Mapping[str, int],
    order: Sequence[str],
    waits: Mapping[str, tuple[str, ...]],
) -> float:
    """Seconds until all calls are done, where those that run at once share the GPU's processors."""
    queues: dict[int, list[str]] = defaultdict(list)
    for name in reversed(order):
        queues[stream[name]].append(name)
    now = 0.0
    ends: dict[str, float] = {}
    left: dict[str, float] = {}  # of the calls that run, the seconds that they still take alone
    while any(queues.values()):
        later = _started(queues, calls, waits, now, ends, left)
        if not left and not later:
            break
        slower = max(1.0, sum(calls[name].share for name in left))
        step = min([*(slower * seconds for seconds in left.values()), *(start - now for start in later)])
        now += step
        for name in list(left):
            left[name] -= step / slower
            if left[name] <= 1e-12:
                del left[name]
                ends[name] = now
                queues[stream[name]].pop()
    return now


def _started(
    queues: Mapping[int, list[str]],
    calls: Mapping[str, Call],
    waits: Mapping[str, tuple[str, ...]],
    now: float,
    ends: dict[str, float],
    left: dict[str, float],
) -> list[float]:
    """Start all that can; when those can that wait for nothing but the handover of a value."""
    more = True
    while more:  # what takes no time ends at once, and others may start then
        more, later = False, []
        for queue in queues.values():
            if not queue or queue[-1] in left or any(name not in ends for name in waits[queue[-1]]):
                continue
            start = max((ends[name] + HANDOVER_S for name in waits[queue[-1]]), default=now)
            if start > now:
                later.append(start)
            elif calls[queue[-1]].seconds:
                left[queue[-1]] = calls[queue[-1]].seconds
            else:
                ends[queue.pop()] = now
                more = True
    return later
