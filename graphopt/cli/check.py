"""``graphopt check``: the gate before a deployment. It says no when a model became worse than its lock."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from graphopt.cli import _options
from graphopt.cli._budgets import parsed, with_budgets
from graphopt.cli._errors import told
from graphopt.cli._progress import bar
from graphopt.cli._work import work
from graphopt.errors import InputError
from graphopt.gate import formats, render
from graphopt.gate import lock as lockfile
from graphopt.gate.finding import require_compared, worst
from graphopt.observe.files import write_text

if TYPE_CHECKING:
    from graphopt.cli import _gate

_WIDTH = 160  # where there is no terminal to ask


class Format(enum.StrEnum):
    """Forms that the result can be written in."""

    table = "table"
    json = "json"
    junit = "junit"
    sarif = "sarif"
    github = "github"
    gitlab = "gitlab"
    markdown = "markdown"


@with_budgets
def check(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC...]",
            show_default=False,
            help="Models of the lock: names, or patterns with *; all by default.",
        ),
    ] = None,
    lock: _options.Lock = Path(lockfile.NAME),
    update: Annotated[
        bool, typer.Option("--update", help="Show what differs, then write it into the lock.")
    ] = False,
    report: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT[=FILE]", help="table, json, junit, sarif, github, gitlab or markdown. Repeatable."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Keep the results, for --judge.")
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option(
            "--judge", metavar="FILE", show_default=False, help="Judge saved results again; nothing is run."
        ),
    ] = None,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Whether to time the models.")] = True,
    cached: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="Whether a check that passed counts while nothing changes."),
    ] = True,
    everything: Annotated[bool, typer.Option("--all", help="Show the comparisons that passed, too.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
    *,
    given: dict[str, str],
) -> None:
    """Hold models to the lock: fusions, executors, kernels, copies, memory, size, numerics and speed.

    Every difference is told with its causes. Improvements never fail. Speed is compared as a ratio to a
    baseline that is timed in the same run, and fails only where its whole confidence interval lies beyond
    the budget. Budgets come from [tool.graphopt.check] of pyproject.toml, from the lock, and from the
    options below.

    **Exit codes:** 0 pass, 1 regression, 2 wrong use or input (a check that checked nothing is), 3
    inconclusive, 4 a fault of graphopt, 130 interrupted.

    **Examples:**

    - graphopt check
    - graphopt check 'my_models.*' --report junit=report.xml --report github
    - graphopt check --save results.json, later: graphopt check --judge results.json --max-slowdown 0.2
    """
    with told(debug):
        options, wanted = parsed(given), _formats(report, json)
        from graphopt.cli import _gate
        from graphopt.gate import cache, saved

        if again is not None:
            if specs or update:
                where = f"--judge {again}"
                raise InputError("--judge runs nothing, so it takes neither SPEC nor --update", where=where)
            checked = _gate.Checked(*saved.judge_again(again, options))
            require_compared(checked.results)
        else:
            setting = _gate.Setting(cache.FOLDER if cached and not update else None, timed, update)
            with work(debug), bar(quiet) as progress:
                checked = _gate.check_lock(lock, specs or (), options, setting, progress)
        if save is not None:
            write_text(save, saved.dumps(checked.results, checked.budgets))
        for form, place in wanted:
            _write(form, place, checked, lock)
        if not json and not quiet:
            render.table(checked.results, _console(), all_of_them=everything)
        _warn(checked, quiet)
        if update:
            _update(lock, checked, quiet=quiet or json)
            return
        raise typer.Exit(worst(checked.codes))


def _formats(report: Sequence[str] | None, json: bool) -> list[tuple[Format, Path | None]]:
    found: list[tuple[Format, Path | None]] = [(Format.json, None)] if json else []
    for text in report or ():
        name, _, file = text.partition("=")
        if name not in list(Format):
            raise InputError(
                f"the format {name!r} is unknown",
                where=f"--report {text}",
                hint=f"one of: {', '.join(Format)}",
            )
        found.append((Format(name), Path(file) if file else None))
    return found


def _console() -> Console:
    return Console(width=None if Console().is_terminal else _WIDTH, soft_wrap=True)


def _write(form: Format, place: Path | None, checked: _gate.Checked, lock: Path) -> None:
    """Write the results in one form, into a file or to stdout."""
    from graphopt.gate import saved

    results, budgets = checked.results, checked.budgets
    match form:
        case Format.table:
            console = _console()
            with console.capture() as captured:
                render.table(results, console)
            text = captured.get()
        case Format.json:
            text = saved.dumps(results, budgets)
        case Format.junit:
            text = formats.junit(results, budgets)
        case Format.sarif:
            text = formats.sarif(results, str(lock))
        case Format.github:
            text = formats.github(results, str(lock))
        case Format.gitlab:
            text = formats.gitlab(results, str(lock))
        case Format.markdown:
            text = render.markdown(results)
    if place is None:
        typer.echo(text, nl=False)
    else:
        write_text(place, text)


def _warn(checked: _gate.Checked, quiet: bool) -> None:
    unsure = [result.model for result in checked.results if result.verdict == "inconclusive"]
    modes = {name: checked.budgets[name].on_inconclusive for name in unsure}
    notes = [f"{name} is inconclusive, and on_inconclusive is {mode!r}" for name, mode in modes.items()]
    console = Console(stderr=True, soft_wrap=True)
    for note in () if quiet else (*checked.notes, *notes):
        console.print(Text(f"note: {note}"))


def _update(lock: Path, checked: _gate.Checked, *, quiet: bool) -> None:
    """Show what the lock is about to say otherwise, and write it."""
    from graphopt.cli import _gate

    entries = checked.entries
    new = {**entries, **{r.model: _gate.updated(entries[r.model], r) for r in checked.results}}
    before, after = (lockfile.dumps(side).splitlines() for side in (entries, new))
    diff = list(difflib.unified_diff(before, after, str(lock), str(lock), "locked", "now", lineterm=""))
    console = Console(soft_wrap=True, stderr=quiet)
    if not diff:
        console.print(Text(f"{lock} is up to date"))
        return
    for line in diff:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        console.print(Text(line, style=style))
    lockfile.write(lock, new)
    console.print(Text(f"wrote {lock}"))
