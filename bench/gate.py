"""``python -m bench gate``: how often the gate is wrong about speed, and how long a check takes.

Two questions that only repetition answers. On a loaded machine (every core busy by another process), how many
checks of a model that did not change fail? On an idle one, how many checks find it a tenth slower? The lock
is written once, on the machine as it is; then processes of their own check the model against it, each many
times: what differs between processes (where memory lies, where threads land) is in the numbers. What is
repeated is the part that can be wrong: the rounds and the judgement, at the default budgets. The rest of a
check is the same every time, and is run whole, from nothing and from the cache, to be timed. Two hundred
checks take two hours: with ``--journal`` a run that was interrupted goes on where it was, against its lock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from bench import RESULTS, rows_of
from bench.markdown import table
from bench.models import minilm
from graphopt.cli import _gate
from graphopt.cli._subject import Config, examine, prepare
from graphopt.gate import latency
from graphopt.gate import lock as lockfile
from graphopt.gate.budgets import Budgets
from graphopt.gate.facts import machine
from graphopt.gate.judge import limits_of, speed
from graphopt.observe.machine import commit
from graphopt.observe.snapshot import versions
from graphopt.runtime.rounds import Run, clock_of

SPEC = "bench.gate:model"
SLOWER = 1.10
_ROOT = Path(__file__).resolve().parent.parent
_BUSY = "while True: pass"


def model() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """What is checked: MiniLM on a sentence of 32 tokens."""
    return minilm(1, 32)


def main(arguments: list[str]) -> None:
    """Run the experiments, print the tables, and record the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench gate", description=__doc__)
    parser.add_argument("--checks", type=int, default=200, help="A/A checks on the loaded machine")
    parser.add_argument("--slow", type=int, default=100, help="checks of a slow-down on the idle machine")
    parser.add_argument("--idle", type=int, default=50, help="A/A checks on the idle machine")
    parser.add_argument("--whole", type=int, default=3, help="whole checks, from nothing and from the cache")
    parser.add_argument("--processes", type=int, default=5, help="that share the checks of an experiment")
    parser.add_argument("--seconds", type=float, default=Budgets().seconds, help="the budget of that name")
    parser.add_argument("--journal", type=Path, help="folder for the lock, and for verdicts as they come")
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    given = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = given.journal or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / lockfile.NAME
        if not lock.exists():
            _run("-m", "graphopt", "lock", SPEC, "--lock", str(lock), "--seconds", str(given.seconds), "-q")
        rows = [_whole(lock, given.whole)] if given.whole else []
        if given.slow:
            rows.append(_experiment("10 % slower, idle", lock, given.slow, given, slower=SLOWER))
        if given.idle:
            rows.append(_experiment("A/A, idle", lock, given.idle, given))
        if given.checks:
            with busy():
                rows.append(_experiment("A/A, every core busy", lock, given.checks, given))
    _print(rows)
    if not given.dry:
        command = " ".join(["python -m bench gate", *arguments])
        _record(rows, re.sub(r" --journal[= ]\S+", "", command))  # a folder of this machine


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A process of its own on every core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(cores)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _experiment(
    case: str, lock: Path, checks: int, given: argparse.Namespace, slower: float = 1.0
) -> dict[str, Any]:
    """So many checks, shared by processes; a row with what they said."""
    journal = lock.with_name(re.sub(r"\W+", "-", case) + ".jsonl")
    share = -(-checks // given.processes)
    while len(told := _told(journal)) < checks:
        count = min(share, checks - len(told))
        with journal.open("a") as verdicts:
            _run("-m", "bench.gate", str(lock), str(count), str(slower), str(given.seconds), to=verdicts)
    told = told[:checks]
    counts = Counter(row["verdict"] for row in told)
    ratios, to_baseline = ([row[name] for row in told] for name in ("ratio", "to_baseline"))
    return {
        "case": case,
        "checks": len(told),
        "regression": counts["regression"],
        "inconclusive": counts["inconclusive"],
        "pass": counts["pass"],
        "doubts": dict(
            Counter(f"{rule}: {_doubt(said)}" for row in told for rule, said in row["doubts"].items())
        ),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "ratio_locked": told[0]["locked"],
        "to_baseline_range": [round(min(to_baseline), 4), round(max(to_baseline), 4)],
        "rounds": statistics.median(row["rounds"] for row in told),
        "waiting": statistics.median(row["waiting"] or 0.0 for row in told),
        "seconds_a_check": round(statistics.median(row["seconds"] for row in told), 1),
        "processes": len({row["process"] for row in told}),
    }


def _told(journal: Path) -> list[dict[str, Any]]:
    """The verdicts so far; what an interrupted process left of its last one is passed over."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def _doubt(message: str) -> str:
    """What an inconclusive finding says, without its numbers."""
    kinds = {
        "too noisy": "too noisy",
        "waited for a core": "no core",
        "the baseline itself": "slower machine",
    }
    return next((kind for words, kind in kinds.items() if words in message), message)


def _check_often(lock: Path, count: int, slower: float, seconds: float) -> None:
    """In a process of its own: examine the model once, then time and judge it; a JSON line a verdict."""
    (entry,) = lockfile.read(lock).values()
    budgets = Budgets(seconds=seconds)
    prepared = prepare(Config.of(entry, SPEC))
    examined = examine(prepared, entry["runs"], None, lambda name, done: None)
    assert examined.optimized is not None
    device = examined.optimized.plan.device
    sides = _gate.sides_of(prepared, examined.optimized, budgets.baseline)
    sides[latency.CANDIDATE] = slowed(sides[latency.CANDIDATE], slower, device)
    limits = limits_of(entry["facts"], examined.facts, budgets, sides)
    side, _ = limits["slowdown"]
    for _ in range(count):
        start = time.perf_counter()
        rounds = latency.measure(sides, [*limits.values()], seconds, clock=clock_of(device))
        findings = [*speed(entry["facts"], examined.facts, rounds, budgets)]
        statuses = {found.status for found in findings}
        failed, unsure = "failed" in statuses, "inconclusive" in statuses
        verdict = "regression" if failed else "inconclusive" if unsure else "pass"
        doubts = {found.rule: found.message for found in findings if found.status == "inconclusive"}
        row = {
            "verdict": verdict,
            "doubts": {} if failed else doubts,
            "ratio": rounds.ratio(to=side).middle,
            "locked": latency.locked_ratio(entry["facts"]["latency"], side)["ratio"],
            "to_baseline": rounds.ratio().middle,
            "rounds": rounds.count,
            "waiting": rounds.waiting,
            "seconds": time.perf_counter() - start,
            "process": os.getpid(),
        }
        print(json.dumps(row), flush=True)


def slowed(run: Run, factor: float, device: torch.device) -> Run:
    """A call that takes so many times as long: it computes on for the rest, a GPU idle beside it."""
    if factor == 1:
        return run

    def slower() -> None:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        until = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass

    return slower


def _whole(lock: Path, times: int) -> dict[str, Any]:
    """Whole checks from the command line: from nothing, and from the cache; the worst of each in seconds."""
    took: dict[str, list[float]] = {"from nothing": [], "cached": []}
    codes = set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times):
            for kind, options in (("from nothing", ["--no-cache"]), ("cached", [])):
                command = [sys.executable, "-m", "graphopt", "check", "--lock", str(lock), "-q", *options]
                if kind == "cached" and not took[kind]:
                    subprocess.run(command, cwd=folder, env=_environment(), check=False)  # fills the cache
                start = time.perf_counter()
                codes.add(subprocess.run(command, cwd=folder, env=_environment(), check=False).returncode)
                took[kind].append(time.perf_counter() - start)
    return {
        "case": "MiniLM 1x32, whole check",
        "seconds_from_nothing": round(max(took["from nothing"]), 1),
        "seconds_cached": round(max(took["cached"]), 1),
        "checks": 2 * times,
        "exit_codes": sorted(codes),
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}


def _run(*arguments: str, to: TextIO | None = None) -> None:
    """Run a process of this Python; what it prints goes to a file, if anywhere."""
    command = [sys.executable, *arguments]
    subprocess.run(command, cwd=_ROOT, env=_environment(), stdout=to or subprocess.DEVNULL, check=True)


def _print(rows: list[dict[str, Any]]) -> None:
    shown = Table("case", "checks", "regression", "inconclusive", "pass", "ratio (locked)", "seconds")
    for row in rows:
        if "pass" in row:
            low, high = row["ratio_range"]
            ratio = f"{row['ratio']:.3f} in [{low:.3f}, {high:.3f}] ({row['ratio_locked']:.3f})"
            counts = [str(row[name]) for name in ("checks", "regression", "inconclusive", "pass")]
            shown.add_row(row["case"], *counts, ratio, f"{row['seconds_a_check']} a check")
        else:
            seconds = f"{row['seconds_from_nothing']} from nothing, {row['seconds_cached']} cached"
            shown.add_row(row["case"], str(row["checks"]), "", "", "", "", seconds)
    Console().print(shown)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Recorded rows as a table, with where and how they were measured."""
    counts = ("checks", "regression", "inconclusive", "pass")
    cells = []
    for row in rows:
        if "pass" in row:
            low, high = row["ratio_range"]
            ratio = f"{low:.3f} to {high:.3f}, {row['ratio_locked']:.3f}"
            cells.append([row["case"], *(str(row[name]) for name in counts), ratio])
    whole = next(row for row in rows if "seconds_cached" in row)
    where = f"on {whole['machine']['threads']} threads of an {whole['machine']['cpu']}"
    commits = sorted({f"{row['commit']}, {row['date']}" for row in rows})
    note = (
        f"MiniLM 1x32 {where}. A whole check takes {whole['seconds_from_nothing']:.0f} s, and"
        f" {whole['seconds_cached']:.0f} s where nothing changed. torch {whole['versions']['torch']}; commit"
        f" {'; '.join(commits)}. Again: `python -m bench gate`."
    )
    head = ["case", *counts, "ratio to the control, in the lock"]
    return "\n".join([*table(head, cells), "", note, ""])


def _record(rows: list[dict[str, Any]], command: str) -> None:
    path = RESULTS / "gate.jsonl"
    new = {row["case"] for row in rows}
    context = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(_ROOT),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }
    kept = [row for row in rows_of(path) if row["case"] not in new]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *({**row, **context} for row in rows))))


if __name__ == "__main__":
    _check_often(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
