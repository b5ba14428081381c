"""Budgets held against facts and rounds; together with the differences they make the result of a check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from graphopt.gate import causes, latency, probe
from graphopt.gate.budgets import Budgets
from graphopt.gate.causes import Facts
from graphopt.gate.compare import differences, same_machine
from graphopt.gate.finding import Finding, Result, Status
from graphopt.gate.latency import BASELINE, CANDIDATE, CONTROL, Interval, Limit, Rounds
from graphopt.observe import summary

_ERROR_FACTOR = 4.0  # errors of two versions of a kernel, both right, are apart by less


def judge(result: Result, budgets: Budgets) -> Result:
    """The result with its findings: of the facts and samples that it holds, under these budgets."""
    locked, now = result.locked["facts"], result.facts
    rounds = Rounds(result.samples, result.waiting) if result.samples else None
    findings = [
        *differences(locked, now),
        *_cost(locked, now, budgets),
        *_numerics(locked, now, budgets),
        *_metric(locked, now, budgets),
        *speed(locked, now, rounds, budgets),
        *_throughput(now, rounds, budgets),
        *_memory(locked, now, budgets),
        *_size(locked, now, budgets),
        *_load(now, budgets),
    ]
    return replace(result, findings=findings)


def limits_of(locked: Facts, now: Facts, budgets: Budgets, sides: Iterable[str]) -> dict[str, Limit]:
    """The limits of the ratios of times, by rule; those that come from the lock only where it carries over.

    Args:
        locked: facts of the lock.
        now: facts of now.
        budgets: that are kept.
        sides: that are timed.
    """
    found = {}
    if budgets.max_latency_ratio is not None:
        found["latency-ratio"] = (BASELINE, budgets.max_latency_ratio)
    before = locked["latency"]
    if not before or budgets.max_slowdown is None or same_machine(locked, now):
        return found
    same_baseline = before["baseline"] == budgets.baseline
    controlled = CONTROL in before and CONTROL in sides
    if controlled or same_baseline:
        side = CONTROL if controlled else BASELINE
        found["slowdown"] = (side, latency.locked_ratio(before, side)["ratio"] * (1 + budgets.max_slowdown))
    if budgets.max_baseline_slowdown is not None and controlled and same_baseline:
        limit = before["ratio"] * (1 + budgets.max_baseline_slowdown)
        found["baseline-slowdown"] = (BASELINE, limit)
    return found


def _why(locked: Facts, now: Facts) -> tuple[tuple[str, ...], str]:
    """Causes that any number may have: what the model does, and what changed around it."""
    model, line = causes.in_the_model(locked, now)
    return (*model, *causes.around(locked, now)), line


def _growth(
    rule: str,
    what: str,
    before: float,
    after: float,
    most: float | None,
    unit: str,
    locked: Facts,
    now: Facts,
    own: tuple[str, ...] = (),
) -> Finding:
    """A number that may grow by a fraction of what the lock has."""
    show = summary.size if unit == "bytes" else lambda count: f"{count:.4g} {unit}".strip()
    ratio = after / before if before else (math.inf if after else 1.0)
    if ratio == 1 or most is None:
        return Finding(rule, "passed" if most is not None else "skipped", f"{what}: {show(after)}")
    message = f"{what}: {show(before)} -> {show(after)}, {ratio - 1:+.1%}"
    if ratio <= 1 + most:
        return Finding(rule, "improved" if ratio < 1 - 1e-3 else "passed", message)
    because, line = _why(locked, now)
    return Finding(rule, "failed", f"{message}, and {most:.1%} is allowed", own + because, line)


def _cost(locked: Facts, now: Facts, budgets: Budgets) -> Iterator[Finding]:
    most = budgets.max_cost_growth
    for key, what, unit in (
        ("flops", "operations a call", "FLOP"),
        ("bytes", "memory traffic a call", "bytes"),
    ):
        found = _growth(f"cost-{key}", what, locked["cost"][key], now["cost"][key], most, unit, locked, now)
        yield (
            replace(found, ms=max(0.0, now["cost"]["ms"] - locked["cost"]["ms"]))
            if found.status == "failed"
            else found
        )


def _numerics(locked: Facts, now: Facts, budgets: Budgets) -> Iterator[Finding]:
    found, before = now["numerics"], locked["numerics"]
    error, usual = float(found["error"]), float(before["error"])
    lossy = tuple(
        f"{name} was applied {n} times"
        for name, (o, n) in causes.changed(locked["fusions"], now["fusions"]).items()
        if n
    )
    because, line = _why(locked, now)
    if budgets.max_error is not None:
        status: Status = "passed" if error <= budgets.max_error else "failed"
        message = f"error against float64: {error:.2e}, {budgets.max_error:.2e} is allowed"
    else:
        status = "passed" if found["ok"] else "failed"
        message = f"error against float64: {error:.2e}" + (f": {found['reason']}" if found["reason"] else "")
    yield Finding(
        "error",
        status,
        message,
        () if status == "passed" else (*lossy, *because),
        "" if status == "passed" else line,
    )
    floor = 2 * float(found["error_original"])  # below it, rounding alone decides what the error is
    grew = error > max(_ERROR_FACTOR * usual, floor) and status == "passed"
    if grew:
        yield Finding(
            "error-growth",
            "failed",
            f"error against float64: {usual:.2e} -> {error:.2e}",
            (*lossy, *because),
            line,
        )
    yield from _drift(locked, now, budgets)


def _drift(locked: Facts, now: Facts, budgets: Budgets) -> Iterator[Finding]:
    """The model itself against the model of the lock, on the same inputs: both in float64."""
    weights = causes.weights(locked, now)
    if budgets.max_drift is None:
        return
    if locked["inputs"] != now["inputs"]:
        why = "the inputs are not those of the lock (does the factory seed its random numbers?)"
        yield Finding("drift", "skipped", f"the outputs were not compared with those of the lock: {why}")
        return
    moved = probe.distance(now["outputs"], locked["outputs"])
    message = f"the model's own outputs moved by {moved:.2g} since the lock"
    if moved <= budgets.max_drift:
        yield Finding("drift", "changed" if weights else "passed", message, tuple(weights))
        return
    because, line = _why(locked, now)
    yield Finding(
        "drift", "failed", f"{message}, {budgets.max_drift:.2g} is allowed", (*weights, *because), line
    )


def _metric(locked: Facts, now: Facts, budgets: Budgets) -> Iterator[Finding]:
    if budgets.metric is None or budgets.max_metric_loss is None:
        return
    found, before = now["metric"], locked["metric"]
    if found is None:
        yield Finding("metric", "skipped", f"{budgets.metric} was not run")
        return
    same = before and before["name"] == found["name"]
    for what, reached in (
        ("the original", found["original"]),
        *((("the lock", before["optimized"]),) if same else ()),
    ):
        loss = reached - found["optimized"]
        message = f"{found['name']}: {found['optimized']:.6g}, {what} has {reached:.6g}"
        if loss <= budgets.max_metric_loss:  # NaN is no good result
            yield Finding("metric", "improved" if loss < -budgets.max_metric_loss else "passed", message)
        else:
            because, line = _why(locked, now)
            words = f"{message}: {loss:.3g} less, {budgets.max_metric_loss:.3g} is allowed"
            yield Finding("metric", "failed", words, (*causes.weights(locked, now), *because), line)


def speed(locked: Facts, now: Facts, rounds: Rounds | None, budgets: Budgets) -> Iterator[Finding]:
    """The ratios to baseline and control of the same run, against the budget and those of the lock."""
    if rounds is None:
        if budgets.max_latency_ratio is not None or budgets.max_slowdown is not None:
            elsewhere = f"{now['cost']['device']} is not here, so only its graph is checked"
            why = "not timed" if now["plan"] else elsewhere
            yield Finding("latency-ratio", "skipped", f"latency was not compared: {why}")
        return
    limits = limits_of(locked, now, budgets, rounds.times)
    other = same_machine(locked, now)
    before = None if other else locked["latency"]
    for rule, (side, limit) in limits.items():
        ratio = rounds.ratio(to=side)
        against = f"the time of {budgets.baseline if side == BASELINE else 'the graph as captured'}"
        usual = None
        if rule != "latency-ratio" and before is not None:
            usual = latency.locked_ratio(before, side)
            against += f", {usual['ratio']:.3f} in the lock"
        message = f"{ratio} times {against}, {limit:.3f} is allowed"
        found = _told(rule, ratio, limit, message, rounds, before, side, locked, now)
        better = usual is not None and ratio.high < usual["low"]
        yield replace(found, status="improved") if better and found.status == "passed" else found
    if "slowdown" not in limits and budgets.max_slowdown is not None:
        why = other or "the lock has no ratio to this baseline"
        yield Finding("slowdown", "skipped", f"the ratio was not compared with that of the lock: {why}")


def _told(
    rule: str,
    found: Interval,
    limit: float,
    message: str,
    rounds: Rounds,
    before: Mapping[str, Any] | None,
    side: str,
    locked: Facts,
    now: Facts,
) -> Finding:
    """An interval against a limit; broken only on a machine that can prove it."""
    told = found.tell(limit)
    if told == "within":
        return Finding(rule, "passed", message)
    if told == "unknown":
        words = f"{message}: too noisy to tell after {rounds.count} rounds"
        return Finding(
            rule, "inconclusive", words, ("run it again, on a quieter machine or with more --seconds",)
        )
    if why := latency.not_comparable(rounds, before, side):
        return Finding(rule, "inconclusive", f"{message}; but {why}")
    because, line = _why(locked, now)
    return Finding(
        rule, "failed", message, because or ("nothing that is recorded of the model changed",), line
    )


def _throughput(now: Facts, rounds: Rounds | None, budgets: Budgets) -> Iterator[Finding]:
    least = budgets.min_throughput
    if least is None:
        return
    if rounds is None or not now["items"]:
        yield Finding("throughput", "skipped", "throughput was not compared: nothing was timed")
        return
    ms, items = rounds.milliseconds(CANDIDATE), now["items"]
    slowness = Interval(ms.middle / items / 1e3, ms.low / items / 1e3, ms.high / items / 1e3)
    interval = f"{1 / slowness.middle:.4g} items a second [{1 / slowness.high:.4g}, {1 / slowness.low:.4g}]"
    message = f"{interval}, at least {least:.4g} are asked for"
    told = slowness.tell(1 / least) if least else "within"
    why = latency.not_comparable(rounds, None) if told == "beyond" else ""
    status: Status = (
        "passed" if told == "within" else "failed" if told == "beyond" and not why else "inconclusive"
    )
    yield Finding("throughput", status, f"{message}; but {why}" if why else message)


def _absolute(rule: str, what: str, found: float, most: float | None, show: Any) -> Iterator[Finding]:
    if most is not None:
        status: Status = "passed" if found <= most else "failed"
        yield Finding(rule, status, f"{what}: {show(found)}, {show(most)} is allowed")


def _memory(locked: Facts, now: Facts, budgets: Budgets) -> Iterator[Finding]:
    before, after = locked["memory"], now["memory"]
    rows = causes.changed(before, after)
    parts = [
        f"{key}: {summary.size(a)} -> {summary.size(b)}"
        for key, (a, b) in rows.items()
        if key in ("weights", "folded", "activations")
    ]
    own = (", ".join(parts), f"the largest value at the peak is {after['largest']}") if parts else ()
    yield _growth(
        "memory",
        "peak memory by accounting",
        before["peak"],
        after["peak"],
        budgets.max_memory_growth,
        "bytes",
        locked,
        now,
        own,
    )
    yield from _absolute(
        "memory-limit", "peak memory by accounting", after["peak"], budgets.max_memory, summary.size
    )
    yield from _served_memory(locked, now, budgets)


def _served_memory(locked: Facts, now: Facts, budgets: Budgets) -> Iterator[Finding]:
    """What a process that serves the model really takes; the allowance has room for an allocator's habits."""
    before, after = ((side["serve"] or {}).get("peak_bytes") for side in (locked, now))
    if before is None or after is None or budgets.max_memory_growth is None:
        return
    if why := same_machine(locked, now):
        yield Finding("memory-served", "skipped", f"resident memory was not compared: {why}")
        return
    most = budgets.max_memory_growth + _ALLOCATOR / max(before, 1)
    yield _growth(
        "memory-served",
        "resident memory of a process that serves it",
        before,
        after,
        most,
        "bytes",
        locked,
        now,
    )


_ALLOCATOR = 16 * 2**20


def _size(locked: Facts, now: Facts, budgets: Budgets) -> Iterator[Finding]:
    if not (locked["serve"] and now["serve"]):
        return
    before, after = (side["serve"]["artifact_bytes"] for side in (locked, now))
    kinds = causes.changed(locked["memory"], now["memory"])
    own = tuple(
        f"{key}: {summary.size(a)} -> {summary.size(b)}"
        for key, (a, b) in kinds.items()
        if key in ("weights", "folded")
    )
    yield _growth(
        "size",
        "what is written of the model",
        before,
        after,
        budgets.max_size_growth,
        "bytes",
        locked,
        now,
        own,
    )
    yield from _absolute("size-limit", "what is written of the model", after, budgets.max_size, summary.size)


def _load(now: Facts, budgets: Budgets) -> Iterator[Finding]:
    if budgets.max_load_ms is None:
        return
    found = (now["serve"] or {}).get("load_ms")
    if found is None:
        yield Finding(
            "load",
            "skipped",
            "the time to load was not measured: the plan needs PyTorch, or its target is not here",
        )
        return
    yield from _absolute("load", "time to load", found, budgets.max_load_ms, lambda ms: f"{ms:.0f} ms")
