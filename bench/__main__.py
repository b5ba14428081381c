"""``python -m bench SUITE...``: measure suites and record their rows under ``bench/results``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench import RESULTS, catalogue, compile_time, crossings, gate, kernels, rows_of, serving
from bench.readme import update_readme, update_tables
from bench.suites import SUITES
from graphopt.bench import peers, table
from graphopt.bench.page import write_page
from graphopt.bench.rows import line, read_all, require_appendable
from graphopt.bench.setting import LIMIT, Case, Setting
from graphopt.cli._errors import told
from graphopt.cli.bench import run_cases
from graphopt.observe.files import write_text


def main() -> None:
    """Measure, record, print, and bring the README's tables up to date."""
    if sys.argv[1:2] == ["gate"]:
        gate.main(sys.argv[2:])
        return
    given = _parser().parse_args()
    try:
        with told(debug=given.debug):
            raise typer.Exit(max([_run(name, given) for name in given.suites]))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


def _run(name: str, given: argparse.Namespace) -> int:
    """What one name on the command line asks for; returns its exit code."""
    if name in PAGES:
        PAGES[name]()
    elif name in TABLED:
        _tabled(name, given)
    elif name == "kernels":
        against = (given.against or "eager,inductor").split(",")
        kernels.run(given.only, against, tuned=given.tune, record=not given.dry)
    else:
        return _measure(name, given)
    return 0


def _catalogue() -> None:
    every = track(list(catalogue.cases()), "architectures")
    catalogue.update_page([catalogue.measure(*case) for case in every])


def _tabled(name: str, given: argparse.Namespace) -> None:
    """A suite with rows and a table of its own."""
    threads = given.threads or torch.get_num_threads()
    suite = TABLED[name]
    cases = {case: suite.CASES[case] for case in _named(suite.CASES, given.only)}
    rows = [suite.measure(case, size, threads) for case, size in cases.items()]
    Console().print(suite.table(rows))
    if given.dry:
        return
    path = RESULTS / f"{name}.jsonl"
    command = f"python -m bench {name} --threads {threads}"
    kept = [row for row in rows_of(path) if row["case"] not in cases]
    write_text(path, "".join(map(line, [*kept, *({**row, "command": command} for row in rows)])))


# Suites with rows and a table of their own.
TABLED: dict[str, Any] = {"time": compile_time, "crossings": crossings, "serve": serving}

# What is made without measuring sides against each other, by the name of its page.
PAGES = {"readme": update_readme, "catalogue": _catalogue}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="Suites: " + "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()) + ".",
    )
    parser.add_argument(
        "suites",
        nargs="+",
        metavar="suite",
        choices=[*SUITES, "kernels", *TABLED, *PAGES],
        help="suites; or kernels: the Triton kernels, on a GPU; or time: how long optimizing takes; or"
        " crossings: what it costs that executors share a model; or serve: sessions of 64 clients, 100,000"
        " random requests, and what the scheduler itself takes; or"
        " readme: only rewrite its tables; or catalogue: what is found in every architecture (and gate, with"
        " options of its own: python -m bench gate -h)",
    )
    parser.add_argument("--against", help="peers, by comma; by default the suite's")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a case's rounds, at most")
    parser.add_argument("--threads", type=int, help="of every side on a CPU; all cores by default")
    parser.add_argument("--limit", type=float, default=LIMIT, help="of a side's build or call; 0 for none")
    parser.add_argument("--only", default="", help="the case of this name, or those whose names contain it")
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    parser.add_argument("--tune", action="store_true", help="kernels: measure their configurations first")
    parser.add_argument("--debug", action="store_true", help="show what the cases' processes print")
    return parser


def _measure(name: str, given: argparse.Namespace) -> int:
    suite, recorded = SUITES[name], RESULTS / f"{name}.jsonl"
    setting = Setting(
        tuple(peers.named(given.against or suite.against)),
        given.rounds,
        given.seconds,
        given.threads,
        given.limit or None,
    )
    cases = _runnable(suite.cases)
    wanted = _named([case.name for case in cases], given.only)
    cases = [case for case in cases if case.name in wanted]
    if not cases:
        print("nothing to measure here")
        return 2
    if not given.dry:
        RESULTS.mkdir(exist_ok=True)
        require_appendable(recorded)
    run = run_cases(cases, setting, None if given.dry else recorded, debug=given.debug)
    if run.rows:
        table.show(run.rows, Console())
    if run.rows and not given.dry:
        _compact(recorded)
        update_tables()
    return run.exit_code


def _named(cases: Iterable[str], only: str) -> list[str]:
    """The case of a name, or else those whose names contain it."""
    names = list(cases)
    return [only] if only in names else [name for name in names if only in name]


def _runnable(cases: Sequence[Case]) -> list[Case]:
    """The cases whose device is here; the others are named."""
    here = [case for case in cases if not case.device.startswith("cuda") or torch.cuda.is_available()]
    for case in cases:
        if case not in here:
            print(f"left out: {case.name}: needs a CUDA GPU and a CUDA build of PyTorch")
    return here


def _compact(recorded: Path) -> None:
    """Of a case measured again only the newest row stays; the page beside is written anew."""
    found = read_all([recorded])
    write_text(recorded, "".join(map(line, found)))
    write_page(recorded.with_suffix(".html"), found)


if __name__ == "__main__":
    main()
