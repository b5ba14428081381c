"""``python -m bench serve``: what a session gains, what becomes of 100,000 requests, what a step costs.

Closed-loop clients ask, wait for the answer, and ask again. The other sides are the same requests one by one
in a single thread, which is the most that calls one by one can do: threads that call a model themselves only
get into each other's way. They go to the model optimized for one request, and to PyTorch's own. The sides
take turns, A B C, C B A, as in every comparison here.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

import graphopt
from bench.markdown import table as markdown_table
from bench.models import minilm
from graphopt.bench.case import context
from graphopt.errors import DeadlineError
from graphopt.optimized_model import OptimizedModel
from graphopt.runtime import scheduler
from graphopt.runtime.rounds import interleave, quartiles, ratio

CLIENTS, MAX_BATCH, MAX_WAIT_MS = 64, 32, 5.0
# Of a turn; of 256 every fourth was in a batch that a turn's beginning or end left half empty.
_REQUESTS = 768
_ROUNDS = 4  # of two turns a side
_STORM, _STORM_THREADS = 100_000, 16
_STEPS = 200

Row = dict[str, Any]
Case = Callable[[], Row]


def measure(name: str, case: Case, threads: int) -> Row:
    """Run a case; returns its row, JSON-ready, with where and with what it was measured."""
    torch.set_num_threads(threads)
    return {"case": name, **case(), **context(torch.device("cpu"))}


# Clients


def clients(lengths: tuple[int, int], effort: str = "measured") -> Row:
    """MiniLM's requests of one sentence each, one by one and in a session.

    Either side has what is fastest for it: a model optimized for one sentence, and one for a batch of many,
    whose padding nobody reads.

    Args:
        lengths: tokens of the shortest and the longest sentence; between them they are log-uniform.
        effort: as of ``optimize``.
    """
    requests = _requests(lengths)
    alone = _optimized(*requests[0], effort=effort)
    model, _, _ = minilm(*requests[0][0].shape)
    opt = _optimized(*_batch(requests[:MAX_BATCH]), effort=effort, padding="remove")
    latencies: list[float] = []
    with opt.session(max_batch=MAX_BATCH, max_wait_ms=MAX_WAIT_MS) as session:
        sides = {
            "one": lambda: [alone(ids, attention_mask=mask) for ids, mask in requests],
            "eager": lambda: _one_by_one(model, requests),
            "session": lambda: latencies.extend(_closed_loop(session, requests)),
        }
        sides["session"]()  # the batches that are proved
        latencies.clear()
        times = interleave(sides, _ROUNDS)
        stats = session.stats()
    batch_ms, p99_ms = stats["batch_ms"]["median"], statistics.quantiles(latencies, n=100)[98]
    return {
        "clients": CLIENTS,
        "max_batch": MAX_BATCH,
        "max_wait_ms": MAX_WAIT_MS,
        "tokens": list(lengths),
        "executor": opt.report.chosen.name,
        "executor_of_one": alone.report.chosen.name,
        "requests_per_s": {side: _rate(row) for side, row in times.items()},
        "ratio": ratio(times["one"], times["session"]),
        "ratio_to_eager": ratio(times["eager"], times["session"]),
        "latency_ms": {**quartiles(latencies), "p99": round(p99_ms, 2)},
        "batch_ms": stats["batch_ms"],
        "batch_rows": stats["batch_rows"],
        "padding": stats["padding"],
        "bound_ms": round(MAX_WAIT_MS + 3 * batch_ms, 2),
        "remarks": stats["remarks"],
    }


def _one_by_one(model: torch.nn.Module, requests: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for ids, mask in requests:
            model(ids, attention_mask=mask)


def _optimized(ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> OptimizedModel:
    """MiniLM for batches of any size and length like these."""
    model, _, _ = minilm(*ids.shape)
    dims = {0: "batch", 1: "seq"}
    dynamic = {"input_ids": dims, "attention_mask": dims}
    optimized: OptimizedModel = graphopt.optimize(
        model, (ids,), {"attention_mask": mask}, dynamic=dynamic, **options
    )
    return optimized


def _batch(requests: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Requests as one padded batch: their tokens, and the mask of these."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return [pad([tensor[0] for tensor in part]) for part in zip(*requests, strict=True)]


def _requests(lengths: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw, made = random.Random(1), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(_REQUESTS):
        count = round(lengths[0] * (lengths[1] / lengths[0]) ** draw.random())
        ids = torch.randint(1000, 30000, (1, count), generator=generator)
        made.append((ids, torch.ones_like(ids)))
    return made


def _rate(times_ms: Sequence[float]) -> float:
    return round(1e3 * _REQUESTS / statistics.median(times_ms), 2)


def _closed_loop(session: Any, requests: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """All requests by so many clients; returns their latencies in milliseconds."""
    waiting, latencies = iter(requests), []
    lock = threading.Lock()

    def client(name: int) -> None:
        ask = session.client(str(name))
        while True:
            with lock:
                request = next(waiting, None)
            if request is None:
                return
            start = time.perf_counter()
            ask(request[0], attention_mask=request[1])
            latencies.append(1e3 * (time.perf_counter() - start))

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(client, range(CLIENTS)))
    return latencies


# A storm


class Doubled(torch.nn.Module):
    """A model that costs nothing and tells whose answer it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the input; an index that is negative is an error."""
        table = torch.arange(0, 2 * _STORM + 200, 2)
        return torch.nn.functional.embedding(x, table[:, None])[..., 0]


def storm() -> Row:
    """Random requests of many threads, cancelled, late or failing; every answer is checked.

    Raises:
        AssertionError: a request is lost, answered twice, or has another's answer.
    """
    dims = {0: "batch", 1: "seq"}
    example = torch.arange(12).view(3, 4)
    opt = graphopt.optimize(
        Doubled().eval(), (example,), dynamic={"x": dims}, executors=("eager",), effort="fast"
    )
    ends: Counter[str] = Counter()
    marks = []
    start = time.perf_counter()
    with opt.session(max_batch=32, max_wait_ms=0.5, queue_size=256) as session:
        for part in range(10):
            numbers = range(part * _STORM // 10, (part + 1) * _STORM // 10)
            with ThreadPoolExecutor(_STORM_THREADS) as threads:
                work = partial(_ask_wildly, session, numbers)
                for found in threads.map(work, range(_STORM_THREADS)):
                    ends += found
            gc.collect()
            marks.append(_resident_bytes())
        stats = session.stats()
    took = time.perf_counter() - start
    assert ends.total() == _STORM, f"{_STORM - ends.total()} requests were lost"
    assert {kind: stats[kind] for kind in ends} == dict(ends), "the session counts otherwise"
    return {
        "requests": _STORM,
        "ends": dict(ends),
        "requests_per_s": round(_STORM / took),
        "resident_mib": [round(mark / 2**20, 1) for mark in marks],
        "batch_rows": stats["batch_rows"],
    }


def _ask_wildly(session: Any, numbers: range, worker: int) -> Counter[str]:
    draw, asked = random.Random(numbers.start + worker), []
    for number in numbers[worker::_STORM_THREADS]:
        length = draw.randrange(1, 17)
        x = number + torch.arange(length)[None]
        bad = draw.random() < 0.01
        hurry = draw.choice([None, None, None, 1.0])
        client = session.client(f"client {worker}", priority=draw.randrange(3), deadline_ms=hurry)
        asked.append((x, bad, client.submit(-1 - x if bad else x)))
        if draw.random() < 0.1:
            draw.choice(asked)[2].cancel()
    return Counter(_end(*one) for one in asked)


def _end(x: torch.Tensor, bad: bool, future: Any) -> str:
    with suppress(BaseException):
        future.exception(60)
    assert future.done(), "a request was lost"
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    if isinstance(error, DeadlineError):
        return "expired"
    if error is not None:
        assert bad, f"a good request failed: {error!r}"
        return "failed"
    assert not bad and torch.equal(future.result(), 2 * x), "another's answer"
    return "answered"


def _resident_bytes() -> int:
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# The scheduler


def steps() -> Row:
    """A plan of many steps against the same programs called one after the other: microseconds a step."""
    plan, x = _plan_of_steps()

    def bare() -> torch.Tensor:
        value = x
        for step in plan.steps:
            (value,) = step.program.run([value])
        return value

    sides = {"bare": bare, "scheduler": lambda: scheduler.run(plan, [x])}
    times = interleave(sides, 20 * _ROUNDS, clock=_thread_clock)
    pairs = zip(times["scheduler"], times["bare"], strict=True)
    cost = [1e3 * (ours - theirs) / _STEPS for ours, theirs in pairs]
    return {"steps": _STEPS, "overhead_us_a_step": quartiles(cost), "limit_us_a_step": 20}


def _thread_clock(run: Callable[[], object]) -> float:
    """Milliseconds that this thread computed: waiting for a core is not the scheduler's doing."""
    start = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - start)


def _plan_of_steps() -> tuple[Any, torch.Tensor]:
    """A plan that two executors share, node by node in turn."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    x = torch.randn(2, 8)
    opt: OptimizedModel = graphopt.optimize(model.eval(), (x,), executors=("eager",), effort="fast")
    (step,) = opt.plan.steps
    (read,), (write,) = step.region.reads, step.region.writes
    names = [read, *(f"{write}{index}" for index in range(_STEPS - 1)), write]
    made = []
    for index, (source, name) in enumerate(itertools.pairwise(names)):
        region = dataclasses.replace(step.region, name=f"region{index}", reads=(source,), writes=(name,))
        made.append(dataclasses.replace(step, region=region, frees=(source,)))
    return dataclasses.replace(opt.plan, steps=tuple(made)), x


CASES: dict[str, Case] = {
    "MiniLM, queries of 4 to 12 tokens": partial(clients, (4, 12)),
    "MiniLM, sentences of 8 to 48 tokens": partial(clients, (8, 48)),
    "100,000 requests": storm,
    "scheduler": steps,
}


_SHOWN = (
    "case",
    "PyTorch, one by one (requests/s)",
    "graphopt, one by one (requests/s)",
    "session (requests/s)",
    "p99 (ms)",
    "bound (ms)",
)


def cells(row: Row) -> list[str]:
    """What ``_SHOWN`` names of a row of clients."""
    rates = row["requests_per_s"]
    eager = _beside(rates["eager"], row["ratio_to_eager"]) if "eager" in rates else "-"  # older rows
    numbers = [eager, _beside(rates["one"], row["ratio"])]
    return [row["case"], *numbers, *map(str, (rates["session"], row["latency_ms"]["p99"], row["bound_ms"]))]


def _beside(rate: float, found: dict[str, float]) -> str:
    """A rate, and how many times as high the session's is."""
    return f"{rate} (×{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}])"


def told(row: Row) -> str:
    """What was found of a row without clients, in words."""
    if "ends" not in row:
        return f"{row['overhead_us_a_step']['median']} µs a step"
    ends = ", ".join(f"{count} {name}" for name, count in row["ends"].items())
    memory = f"{row['resident_mib'][0]} MiB after a tenth, {row['resident_mib'][-1]} at the end"
    return f"{ends}; {memory}; {row['requests_per_s']} a second"


def table(rows: Sequence[Row]) -> Group:
    """The rows, a table for each kind."""
    shown, others = Table(*_SHOWN), Table("case", "what was found")
    for row in rows:
        if "bound_ms" in row:
            shown.add_row(*cells(row))
        else:
            others.add_row(row["case"], told(row))
    return Group(*(one for one in (shown, others) if one.row_count))


def markdown(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of Markdown."""
    clients = [row for row in rows if "bound_ms" in row]
    others = [f"- {row['case']}: {told(row)}." for row in rows if row not in clients]
    return [*markdown_table(_SHOWN, map(cells, clients)), "", *others]
