"""``graphopt lock``: write down what is true of a model, for later checks to hold it to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from graphopt.cli import _options
from graphopt.cli._budgets import parsed, with_budgets
from graphopt.cli._errors import told
from graphopt.cli._progress import bar
from graphopt.cli._work import work
from graphopt.errors import InputError
from graphopt.gate import lock as lockfile
from graphopt.observe.files import require_folder
from graphopt.observe.summary import ms, size


@with_budgets
def lock(
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC...", show_default=False, help="The models, as for optimize.")
    ],
    lock: _options.Lock = Path(lockfile.NAME),
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", show_default=False, help="What to call it in the lock; SPEC by default."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the entries that are there.")] = False,
    target: Annotated[
        str, typer.Option(help='"auto", "cpu", "cuda:1", or a GPU that need not be here: "h100", "l4".')
    ] = "auto",
    executors: _options.Executors = None,
    dynamic: _options.DynamicDims = None,
    outputs: _options.Outputs = None,
    level: _options.Level = None,
    enable: _options.Enable = None,
    disable: _options.Disable = None,
    precision: _options.Precision = None,
    calibration: _options.Calibration = None,
    max_loss: _options.MaxLoss = None,
    batch: _options.Batch = 1,
    seq: _options.Seq = None,
    processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="So many time the model, one after the other, each anew.")
    ] = 5,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
    *,
    given: dict[str, str],
) -> None:
    """Optimize models, and write what was found of each into the lock.

    Commit the lock. `graphopt check` then holds every later version of the models to it. How a model is made
    and optimized is written down as well, and so are the budgets given here: they are this model's own.

    **Exit codes:** 0 done, 1 no executor gives the right answer, 2 wrong use or input, 4 a fault of
    graphopt, 130 interrupted. Only 0 writes anything.

    **Examples:**

    - graphopt lock my_models.bert:tiny
    - graphopt lock my_models.bert:tiny --name tiny-on-h100 --target h100 --max-latency-ratio 0.9
    """
    with told(debug):
        own = parsed(given)
        from graphopt.cli import _gate
        from graphopt.cli._subject import Config

        require_folder(lock.absolute().parent)  # before the work, not after it
        entries = lockfile.read(lock) if lock.exists() else {}
        names = _names(specs, name, entries, lock, force)
        rows = []
        with work(debug), bar(quiet) as progress:
            for spec, known in zip(specs, names, strict=True):
                config = Config(
                    spec, target, executors, tuple(dynamic or ()), tuple(outputs or ()), level,
                    tuple(enable or ()), tuple(disable or ()), max_loss, batch, seq, precision,
                    calibration,
                )  # fmt: skip
                budgets = _gate.budgets_of({"budgets": own}, known, {})
                entry = _gate.lock_entry(config, own, budgets, processes, progress)
                entries = {**entries, known: entry}
                rows += [f"{known}: {_summary(entry)}", *_notes(entry)]
        lockfile.write(lock, entries)
        if not quiet:
            console = Console(soft_wrap=True)
            for row in (*rows, f"wrote {lock}"):
                console.print(Text(row))


def _names(specs: list[str], name: str | None, entries: dict[str, Any], lock: Path, force: bool) -> list[str]:
    if name is not None and len(specs) > 1:
        raise InputError(f"--name is for one SPEC, not for {len(specs)}", where=f"--name {name}")
    names = [name] if name is not None else list(dict.fromkeys(specs))
    taken = [known for known in names if known in entries]
    if taken and not force:
        raise InputError(
            f"{taken[0]!r} is in {lock.name} already",
            where=str(lock.absolute()),
            hint=f"bring it up to date: graphopt check '{taken[0]}' --update, or replace it with --force",
        )
    return names


def _notes(entry: dict[str, Any]) -> list[str]:
    """What makes a lock one that finds less than it could."""
    from graphopt.gate import latency

    found = latency.noise(entry["facts"]["latency"]) if entry["facts"]["latency"] else ""
    return [f"note: {found}; lock it on a quieter machine, or with more --seconds"] if found else []


def _summary(entry: dict[str, Any]) -> str:
    facts = entry["facts"]
    parts = [f"{sum(facts['fusions'].values())} rewrites, {sum(facts['ops'].values())} calls"]
    if facts["plan"]:
        parts.append(f"{facts['plan']['launches']} kernels on {facts['plan']['chosen']}")
    parts.append(f"peak {size(facts['memory']['peak'])}")
    if found := facts["latency"]:
        times = (
            f"{ms(found['candidate_ms'])} ms, {found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        )
        parts.append(f"{times} times {found['baseline']}")
    return ", ".join(parts)
