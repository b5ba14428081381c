"""What ``lock``, ``check`` and the pytest plugin share: a model of the lock, examined, timed and judged."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from graphopt.cli import _config
from graphopt.cli._subject import Config, Examined, Prepared, Progress, choice, examine, optimized_by, prepare
from graphopt.compiler.remarks import Remarks
from graphopt.errors import SpecError
from graphopt.gate import cache, latency, saved
from graphopt.gate import lock as lockfile
from graphopt.gate.budgets import Budgets
from graphopt.gate.facts import for_lock
from graphopt.gate.finding import Result, exit_code, require_compared
from graphopt.gate.judge import judge, limits_of
from graphopt.gate.lock import Entry, settled
from graphopt.optimized_model import OptimizedModel
from graphopt.precision import EXACT
from graphopt.runtime import scheduler
from graphopt.runtime.executors import EXECUTORS
from graphopt.runtime.partition import find_executors, partition
from graphopt.runtime.plan import Plan
from graphopt.runtime.rounds import Run, clock_of
from graphopt.runtime.target import Target

_LOCK_PRECISION = 0.01  # half-width of the ratio that later checks are held against


def time_it(
    prepared: Prepared,
    examined: Examined,
    budgets: Budgets,
    locked: Mapping[str, Any] | None,
    precision: float,
    progress: Progress,
) -> latency.Rounds | None:
    """Time the optimized model against baseline and control; None where its target is not here.

    Args:
        prepared: the model.
        examined: the same, optimized.
        budgets: that will be kept.
        locked: facts of the lock; None where there is none yet.
        precision: see ``latency.measure``.
        progress: called with (what is being done, fraction done).
    """
    optimized = examined.optimized
    if optimized is None:
        return None
    sides = sides_of(prepared, optimized, budgets.baseline)
    return latency.measure(
        sides,
        [*limits_of(locked, examined.facts, budgets, sides).values()] if locked else [],
        budgets.seconds,
        clock=clock_of(optimized.plan.device),
        precision=precision,
        progress=lambda done: progress("time", 0.7 + 0.3 * done),
    )


def sides_of(prepared: Prepared, optimized: OptimizedModel, baseline: str) -> dict[str, Run]:
    """What is timed: the baseline, the optimized model, and the control, where its executors can run it."""
    args, kwargs = prepared.call
    sides = {
        latency.BASELINE: call_of(baseline_of(prepared, baseline), args, kwargs),
        latency.CANDIDATE: call_of(optimized, args, kwargs),
    }
    control = _control(prepared, optimized.plan)
    return sides if control is None else {**sides, latency.CONTROL: control}


def _control(prepared: Prepared, plan: Plan) -> Run | None:
    """A call of the graph as captured on a plan's executors; None where they cannot run it."""
    names = dict.fromkeys([*(step.executor for step in plan.steps if step.executor in EXECUTORS), "eager"])
    try:
        executors, target = find_executors([*names]), Target(plan.device)
        control = partition(prepared.captured.clone(), executors, target, Remarks(), "fast")
        scheduler.run(control, prepared.inputs)
    except Exception:  # of a library that compiles, too: what cannot be run now is no control
        return None

    def run() -> None:
        with torch.no_grad():
            scheduler.run(control, prepared.inputs)

    return run


def baseline_of(prepared: Prepared, name: str) -> torch.nn.Module:
    """What latency is compared with: the model as it is, or on an executor of graphopt's."""
    if name == "eager":
        return prepared.original
    find_executors([name])
    return optimized_by(prepared, {"executors": [name, "eager"], "precision": EXACT}, "fast", None)


def call_of(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """A call of a model, without autograd; on a GPU it returns before the work is done."""

    def run() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    return run


def lock_entry(
    config: Config, own: Mapping[str, Any], budgets: Budgets, processes: int, progress: Progress
) -> Entry:
    """A new entry of the lock.

    Args:
        config: how the model is made.
        own: budgets of its own, which the entry keeps.
        budgets: all of them.
        processes: so many time the model: this one, and others anew.
        progress: called with (what is being done, fraction done).

    Raises:
        SpecError: another process cannot run the model.
    """
    progress("load", 0.0)
    prepared = prepare(config)
    runs = choice(prepared, progress)
    examined = examine(prepared, runs, budgets.metric, progress)
    rounds = time_it(prepared, examined, budgets, None, _LOCK_PRECISION, progress)
    if rounds is not None:
        examined.facts["latency"] = latency.facts(rounds, budgets.baseline)
    facts = for_lock(examined.facts)
    entry = {"config": asdict(config), "runs": runs, "budgets": dict(own), "facts": facts}
    if rounds is not None and processes > 1:
        del prepared, examined  # the others need the memory
        others = [_timed_elsewhere(entry, progress) for _ in range(processes - 1)]
        facts["latency"] = latency.combined([facts["latency"], *others])
    return entry


def _timed_elsewhere(entry: Entry, progress: Progress) -> dict[str, Any]:
    """What a process of its own, with memory and threads of its own, finds of the latency."""
    progress("time in another process", 0.9)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        lock, results = Path(folder) / lockfile.NAME, Path(folder) / "results.json"
        lockfile.write(lock, {entry["config"]["spec"]: entry})
        given = ["--lock", str(lock), "--save", str(results), "--update", "--no-cache", "--quiet"]
        command = [sys.executable, "-m", "graphopt", "check", *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise SpecError(
                f"the model cannot be timed in a process of its own: {said[0].strip()}",
                where=entry["config"]["spec"],
                hint="--processes 1 times it in this one alone",
            )
        (result,) = json.loads(results.read_text(encoding="utf-8"))["results"]
        found: dict[str, Any] = result["facts"]["latency"]
        return found


def budgets_of(entry: Entry, name: str, given: Mapping[str, Any]) -> Budgets:
    """The budgets of a model: of pyproject.toml, of its entry, and of the options."""
    where, settings = _config.check_settings()
    own = entry.get("budgets", {})
    return Budgets.of((where, settings), (f"budgets of {name} in the lock", own), ("the options", given))


@dataclass(frozen=True)
class Setting:
    """How a check is made.

    Args:
        cache: folder of the cache; None neither reads nor writes it.
        timed: whether models are timed.
        precise: time them as precisely as a lock wants it.
    """

    cache: Path | None = None
    timed: bool = True
    precise: bool = False


@dataclass
class Checked:
    """What a check of several models of a lock found.

    Args:
        results: a row a model.
        budgets: that they were judged under, by model.
        entries: of the lock, all of them.
        notes: what could not be done and does not matter to the verdict.
    """

    results: list[Result]
    budgets: dict[str, Budgets]
    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def codes(self) -> list[int]:
        """The exit code of each model."""
        return [exit_code(result, self.budgets[result.model].on_inconclusive) for result in self.results]


def check_lock(
    lock: Path, specs: Sequence[str], given: Mapping[str, Any], setting: Setting, progress: Progress
) -> Checked:
    """Check models of a lock.

    Args:
        lock: the file.
        specs: names or patterns; none is all.
        given: budgets that win over all others.
        setting: how.
        progress: called with (what is being done, fraction done).

    Raises:
        InputError: the lock cannot be read, no model matches, a budget is unknown, or nothing was compared.
    """
    entries = lockfile.read(lock)
    names = lockfile.matching(entries, specs, lock)
    budgets = {name: budgets_of(entries[name], name, given) for name in names}
    checked = Checked([], budgets, entries)
    for name in names:
        result, note = check_entry(name, entries[name], budgets[name], setting, progress)
        checked.results.append(result)
        checked.notes += [note] if note else []
    require_compared(checked.results)
    return checked


def check_entry(
    name: str, entry: Entry, budgets: Budgets, setting: Setting, progress: Progress
) -> tuple[Result, str]:
    """Check a model against its entry.

    Args:
        name: of the model.
        entry: of the lock.
        budgets: to hold it to.
        setting: how.
        progress: called with (what is being done, fraction done).

    Returns:
        The result, and why it could not be cached, or "".
    """
    start = time.perf_counter()
    config = Config.of(entry, name)
    progress("load", 0.0)
    prepared = prepare(config)
    key, folder = "", setting.cache
    own = budgets.metric, config.calibration  # functions that read what nobody here knows of
    if folder is not None and not any(own):
        settings = entry, budgets.to_dict(), {"timed": setting.timed}
        key = cache.key(prepared.captured, prepared.inputs, prepared.passes, prepared.host, *settings)
        kept = cache.load(folder, key)
        if kept is not None:
            again = saved.result_of(kept["result"])
            return replace(again, cached=kept["date"], seconds=time.perf_counter() - start), ""
    result = _run_check(name, entry, prepared, budgets, setting, progress)
    result = replace(result, seconds=time.perf_counter() - start)
    if folder is None or not key or result.verdict != "pass":
        return result, ""
    row = saved.result_to_dict(result, budgets)
    return result, cache.keep(folder, key, {"result": row, "date": time.strftime("%Y-%m-%d %H:%M")})


def _run_check(
    name: str, entry: Entry, prepared: Prepared, budgets: Budgets, setting: Setting, progress: Progress
) -> Result:
    examined = examine(prepared, entry.get("runs", {}), budgets.metric, progress)
    rounds = None
    if setting.timed:
        precision = _LOCK_PRECISION if setting.precise else 0.0
        rounds = time_it(prepared, examined, budgets, entry["facts"], precision, progress)
    if rounds is None:
        return judge(Result(name, [], entry, examined.facts), budgets)
    examined.facts["latency"] = latency.facts(rounds, budgets.baseline)
    samples = {side: list(row) for side, row in rounds.times.items()}
    return judge(Result(name, [], entry, examined.facts, samples, rounds.waiting), budgets)


def updated(entry: Entry, result: Result) -> Entry:
    """The entry with the facts of now; measured ones stay where noise explains the difference."""
    facts = for_lock(result.facts)
    if facts["latency"] is None:
        facts["latency"] = entry["facts"]["latency"]
    if facts["metric"] is None:
        facts["metric"] = entry["facts"]["metric"]
    return {**entry, "facts": settled(facts, entry["facts"])}
