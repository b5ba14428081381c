"""Differences of the optimized model from the lock, each told as an effect with its causes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt.gate import causes
from graphopt.gate.causes import Facts, changed
from graphopt.gate.facts import SYNCS, pattern_of
from graphopt.gate.finding import Finding, Status
from graphopt.observe import summary


def differences(locked: Facts, now: Facts) -> list[Finding]:
    """Every comparison of facts that needs no budget, those that hold included.

    Args:
        locked: facts of the lock.
        now: facts of now.
    """
    return [
        *_inputs(locked, now),
        *_fusions(locked, now),
        *_reverted(locked, now),
        *_regions(locked, now),
        *_launches(locked, now),
        *_transfers(locked, now),
        *_graph_coverage(locked, now),
        *_gpu(locked, now),
        *_outputs(locked, now),
        *_remarks(locked, now),
        *_around(locked, now),
    ]


def same_machine(locked: Facts, now: Facts) -> str:
    """Why what was measured does not carry over from the machine of the lock; "" when it does."""
    before, after = locked["machine"], now["machine"]
    for key, what in (("cpu", "CPU"), ("threads", "number of threads"), ("gpu", "GPU"), ("system", "system")):
        if before.get(key) != after.get(key):
            return f"the lock was written with another {what}: {before.get(key)}, not {after.get(key)}"
    return ""


def _inputs(locked: Facts, now: Facts) -> Iterator[Finding]:
    for name, (before, after) in changed(locked["inputs"], now["inputs"]).items():
        yield Finding("inputs", "changed", f"input {name}: {before or 'not there'} -> {after or 'not there'}")


def _no_worse(locked: Facts, now: Facts) -> bool:
    """True when a call costs no more than it did in any of what is counted: the model became smaller."""
    both = [name for name in ("plan", "gpu") if now[name] and locked[name]]
    costs = [
        *((now["cost"][key], locked["cost"][key]) for key in ("flops", "bytes")),
        *((now[name]["launches"], locked[name]["launches"]) for name in both),
    ]
    return all(after <= before for after, before in costs)


def _fusions(locked: Facts, now: Facts) -> Iterator[Finding]:
    """Rewrites by pass. Fewer are a loss, unless the whole costs no more: then there was less to do."""
    passes = {**locked["fusions"], **now["fusions"]}
    for name in sorted(passes):
        before, after = locked["fusions"].get(name, 0), now["fusions"].get(name, 0)
        what, did = _said(name)
        if after == before:
            yield Finding("fusions", "passed", f"{what} {did} {after}")
            continue
        message = f"{what} {did} {before} -> {after}"
        if after > before:
            better: Status = "improved" if _no_worse(locked, now) else "changed"
            yield Finding("fusions", better, message, tuple(causes.around(locked, now, [name])))
            continue
        missed = causes.remarks(locked, now, name)
        near = missed or _near_misses(locked, now)
        model, line = causes.in_the_model(locked, now)
        because = (*map(causes.remark_words, near), *model, *causes.around(locked, now, [name]))
        ms = sum(row["ms"] for row in near) or max(0.0, now["cost"]["ms"] - locked["cost"]["ms"])
        source = near[0]["source"] if near else line
        module = near[0]["module"] if near else ""
        lost = not (_no_worse(locked, now) and not missed)
        cost = f"; costs {summary.ms(ms)} ms" if lost and ms else ""
        yield Finding("fusions", "failed" if lost else "changed", message + cost, because, source, module, ms)


def _near_misses(locked: Facts, now: Facts) -> list[dict[str, Any]]:
    """New remarks of any pass at the places that the model spells otherwise, for a pass that says nothing."""
    modules = {row.name.rpartition(" ")[0] for row in causes.places(locked, now)}
    passes = dict.fromkeys(row["pass"] for row in now["remarks"])
    rows = [row for name in passes for row in causes.remarks(locked, now, name)]
    return [row for row in rows if row["source"] and pattern_of(row["module"]) in modules]


def _said(pass_name: str) -> tuple[str, str]:
    """``attention`` and ``fused`` of ``fuse_attention``."""
    verb, _, what = pass_name.partition("_")
    past = {"fuse": "fused", "fold": "folded", "merge": "merged", "prune": "pruned", "hoist": "hoisted"}
    past |= {"remove": "removed", "simplify": "simplified", "quantize": "quantized", "cast": "cast"}
    return (what.replace("_", " "), past[verb]) if what and verb in past else (pass_name, "applied")


def _reverted(locked: Facts, now: Facts) -> Iterator[Finding]:
    for name, (before, after) in changed(locked["reverted"], now["reverted"]).items():
        message = f"{name}: verification reverted {after or 0} rewrites, {before or 0} in the lock"
        if (after or 0) < (before or 0):
            yield Finding("reverted", "improved", message)
            continue
        told = [row for row in causes.remarks(locked, now, name) if "reverted: " in row["reason"]]
        because = (*map(causes.remark_words, told), *causes.around(locked, now, [name]))
        source, module = (told[0]["source"], told[0]["module"]) if told else ("", "")
        yield Finding("reverted", "failed", message, because, source, module)
    for told in sorted(set(now["undone"]) - set(locked["undone"])):
        name = told.partition(":")[0]
        yield Finding(
            "undone",
            "failed",
            f"{name} was taken back as a whole",
            (told, *causes.around(locked, now, [name])),
        )


def _regions(locked: Facts, now: Facts) -> Iterator[Finding]:
    """Who runs what: the executor and the provider of every region."""
    before, after = locked["plan"], now["plan"]
    if before is None or after is None:
        return
    if any(row["device"] == "cuda" for row in before["regions"]) and now["machine"]["gpu"] is None:
        yield Finding("regions", "skipped", "the regions of the lock ran on a GPU, and this machine has none")
        return
    then, here = (_by_runner(side["regions"]) for side in (before, after))
    if then == here:
        words = ", ".join(f"{calls} calls on {runner}" for runner, calls in here.items())
        yield Finding("regions", "passed", words or "nothing is left to run")
        return
    words = "; ".join(
        f"{runner}: {then.get(runner, 0)} -> {here.get(runner, 0)} calls" for runner in {**then, **here}
    )
    slow, slow_now = _worst_calls(before["regions"]), _worst_calls(after["regions"])
    kinds = {_rank(row) for side in (before, after) for row in side["regions"]}
    if len(kinds) == 1:  # more or fewer calls are no other place to run: what they cost is counted elsewhere
        slow = slow_now
    fell = slow_now > slow
    told = [
        row for stage in ("partition", "lower", "candidates") for row in causes.remarks(locked, now, stage)
    ]
    model, line = causes.in_the_model(locked, now)
    lost = _lost_providers(before["regions"], after["regions"], now["machine"].get("providers", ()))
    because = (*lost, *map(causes.remark_words, told), *model, *causes.around(locked, now))
    what = "fell back: " if fell else ""
    status: Status = "failed" if fell else "improved" if slow_now < slow else "changed"
    yield Finding("regions", status, f"{what}{words}", because, told[0]["source"] if told else line)


def _lost_providers(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], offered: Sequence[str]
) -> Iterator[str]:
    """Providers that an executor ran on and does not any more, and what ONNX Runtime says of them here."""
    was, now = ({(row["executor"], row["provider"]) for row in side} for side in (before, after))
    for executor, provider in sorted(was - now):
        if executor not in {name for name, _ in now}:
            continue  # it is not that it runs elsewhere: it does not run
        why = f"this ONNX Runtime has only {causes.listed(offered)}"
        if provider in offered:
            why = "this ONNX Runtime has it, so a library or a driver that it needs does not load"
        yield f"{executor} does not run on {provider} any more: {why}"


def _by_runner(regions: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in regions:
        runner = f"{row['executor']} ({row['provider']}, {row['device']})"
        found[runner] = found.get(runner, 0) + row["calls"]
    return found


def _worst_calls(regions: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The slowest kind of runner that there is, and how many calls it makes; larger is worse."""
    calls: dict[int, int] = {}
    for row in regions:
        calls[_rank(row)] = calls.get(_rank(row), 0) + row["calls"]
    return max(calls.items(), default=(0, 0))


def _rank(region: Mapping[str, Any]) -> int:
    """How far a runner is from the best: a compiled program on a GPU, one on a CPU, PyTorch node by node."""
    in_torch = region["executor"] == "eager"
    on_cpu = region["provider"].startswith("CPU") or (in_torch and region["device"] == "cpu")
    return int(on_cpu) + 2 * int(in_torch)


def _launches(locked: Facts, now: Facts) -> Iterator[Finding]:
    before, after = locked["plan"], now["plan"]
    if before is None or after is None:
        return
    if why := same_machine(locked, now):
        yield Finding("launches", "skipped", f"kernels launched were not compared: {why}")
        return
    executors = [{row["executor"] for row in side["regions"]} for side in (before, after)]
    if executors[0] != executors[1]:
        why = f"{' and '.join(sorted(executors[1]))} ran, not {' and '.join(sorted(executors[0]))}"
        yield Finding("launches", "skipped", f"kernels launched were not compared: {why}")
        return
    yield _count(
        "launches",
        "kernels launched",
        before["launches"],
        after["launches"],
        before["kernels"],
        after["kernels"],
        locked,
        now,
    )


def _count(
    rule: str,
    what: str,
    before: int,
    after: int,
    kinds: Mapping[str, int],
    kinds_now: Mapping[str, int],
    locked: Facts,
    now: Facts,
) -> Finding:
    """A count that should not rise, with the kinds that rose and why."""
    if before == after:
        return Finding(rule, "passed", f"{what}: {after}")
    rows = changed(kinds, kinds_now)
    words = ", ".join(f"{name} {a or 0} -> {b or 0}" for name, (a, b) in rows.items())
    model, line = causes.in_the_model(locked, now)
    because = (*([words] if words else []), *model, *causes.around(locked, now))
    return Finding(
        rule, "failed" if after > before else "improved", f"{what}: {before} -> {after}", because, line
    )


def _transfers(locked: Facts, now: Facts) -> Iterator[Finding]:
    """Copies between devices and waits for values: in the user's forward, and in the plan."""
    for key, what in (
        ("copies", "copies to the host or another device"),
        ("syncs", "waits for a value on the host"),
    ):
        yield _host_calls(key, what, locked, now)
        if locked["plan"] and now["plan"]:
            kinds, kinds_now = locked["plan"][key], now["plan"][key]
            counts = sum(kinds.values()), sum(kinds_now.values())
            yield _count(f"plan-{key}", f"{what} in the plan", *counts, kinds, kinds_now, locked, now)


def _host_calls(key: str, what: str, locked: Facts, now: Facts) -> Finding:
    """What the model's own forward asks of the host.

    A wait that capture decided once (``if mask.all()``) costs nothing later, so more of them fail only where
    more are left in the graph. A copy to the host leaves no trace in a graph that was captured on the host,
    so its call counts.
    """
    before, after, places = locked["host"][key], now["host"][key], now["host"]["places"]
    rows = changed(before, after)
    more = [name for name, (a, b) in rows.items() if (b or 0) > (a or 0)]
    left = [sum(count for op, count in side["ops"].items() if op in SYNCS) for side in (locked, now)]
    costs = key == "copies" or left[1] > left[0]
    words = ", ".join(f"{name} {a or 0} -> {b or 0}" for name, (a, b) in rows.items())
    message = f"{what} in forward: {words or sum(after.values())}"
    if not more:
        return Finding(key, "improved" if rows else "passed", message)
    because = [f"{name} is called at {causes.listed(places.get(name, []))}" for name in more]
    if not costs:
        because.append("capture decided it once: nothing of it is left in the graph")
    source = next((line for name in more for line in places.get(name, [])), "")
    return Finding(
        key, "failed" if costs else "changed", message, (*because, *causes.around(locked, now)), source
    )


def _graph_coverage(locked: Facts, now: Facts) -> Iterator[Finding]:
    if not (locked["plan"] and now["plan"]) or locked["plan"]["cuda_graph_coverage"] is None:
        return
    before, after = (side["plan"]["cuda_graph_coverage"] for side in (locked, now))
    if after is None:
        yield Finding(
            "cuda-graphs", "skipped", "the coverage by CUDA graphs was not compared: not on this device"
        )
        return
    status: Status = "failed" if after < before else "improved" if after > before else "passed"
    yield Finding("cuda-graphs", status, f"replayed by CUDA graphs: {before:.0%} -> {after:.0%} of the calls")


def _gpu(locked: Facts, now: Facts) -> Iterator[Finding]:
    """A named GPU that is not here: launches, and kernels compiled for it."""
    before, after = locked["gpu"], now["gpu"]
    if before is None or after is None:
        return
    yield _count(
        "launches",
        "kernels to launch",
        before["launches"],
        after["launches"],
        before["fused"],
        after["fused"],
        locked,
        now,
    )
    for name, (a, b) in changed(before["without_kernel"], after["without_kernel"]).items():
        if (b or 0) < (a or 0) and after["fused"].get(name, 0) < before["fused"].get(name, 0):
            continue  # not that it has one now: there are fewer of it
        status: Status = "failed" if (b or 0) > (a or 0) else "improved"
        yield Finding(
            "kernels",
            status,
            f"{name} has no kernel: {a or 0} -> {b or 0} calls",
            tuple(causes.around(locked, now)),
        )
    yield from _compiled(before["compiled"], after["compiled"], now["cost"]["device"])


_USED = {
    "registers": "registers a thread",
    "shared": "bytes of shared memory",
    "spilled": "bytes spilled a thread",
}


def _compiled(before: Facts | None, after: Facts | None, gpu: str) -> Iterator[Finding]:
    """Kernels compiled for a GPU that is not here: each must compile, and none spill more than it did."""
    if after is None:
        yield Finding("kernels", "skipped", f"no kernel was compiled for {gpu}: Triton is not installed here")
        return
    for name, row in after.items():
        was = (before or {}).get(name, {})
        if "failed" in row or "refused" in row:
            lost = any(key.startswith(f"{name}: ") for key in before or {})
            status: Status = "failed" if "failed" in row or lost else "skipped"
            what = "does not compile" if "failed" in row else "has no kernel"
            yield Finding(
                "kernels", status, f"{name} for {gpu} {what}: {row.get('failed') or row['refused']}"
            )
            continue
        parts = [f"{row[key]} {words}" for key, words in _USED.items()]
        more = [
            f"{was[key]} -> {row[key]} {_USED[key]}" for key in _USED if was.get(key, row[key]) != row[key]
        ]
        spills = row["spilled"] > was.get("spilled", row["spilled"])
        status = "failed" if spills else "changed" if more else "passed"
        yield Finding("kernels", status, f"{name} for {gpu}: {', '.join(more or parts)}")


def _outputs(locked: Facts, now: Facts) -> Iterator[Finding]:
    before, after = ([row["type"] for row in side["outputs"]] for side in (locked, now))
    if before == after:
        yield Finding("outputs", "passed", f"outputs: {causes.listed(after)}")
        return
    model, line = causes.in_the_model(locked, now)
    words = f"outputs: {causes.listed(before)} -> {causes.listed(after)}"
    yield Finding("outputs", "failed", words, (*model, *causes.around(locked, now)), line)


def _remarks(locked: Facts, now: Facts) -> Iterator[Finding]:
    """Remarks that are new or gone. What they mean for the model is counted elsewhere; here they are told."""
    known, here = (
        {(r["pass"], summary.unnumbered(r["reason"])): r for r in side["remarks"]} for side in (locked, now)
    )
    for key, row in here.items():
        if key not in known:
            words = causes.remark_words(row)
            yield Finding(
                "remarks", "changed", f"new remark: {words}", (), row["source"], row["module"], row["ms"]
            )
    for key, row in known.items():
        if key not in here:
            yield Finding("remarks", "changed", f"gone: {causes.remark_words(row)}")


def _around(locked: Facts, now: Facts) -> Iterator[Finding]:
    model, line = causes.in_the_model(locked, now)
    if model:
        yield Finding("model", "changed", model[0], tuple(model[1:]), line)
    for words in causes.around(locked, now):
        yield Finding("around", "changed", words)
    if locked["plan"] and now["plan"]:
        for name, (a, b) in changed(locked["plan"]["opset"], now["plan"]["opset"]).items():
            yield Finding("around", "changed", f"opset of {name}: {a} -> {b}")
