"""The command line: one file a command, shared parts in the files that begin with an underscore."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from graphopt.cli.bench import bench
from graphopt.cli.bisect import bisect
from graphopt.cli.check import check
from graphopt.cli.explain import explain
from graphopt.cli.lock import lock
from graphopt.cli.optimize import optimize

app = typer.Typer(
    name="graphopt",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (optimize, explain, bisect, bench, lock, check):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphopt {version('graphopt')}")
        raise typer.Exit


@app.callback()
def _graphopt(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Make PyTorch models faster, and prove that they are still the same models.

    A SPEC names a model: **package.module:factory** (a callable without arguments that returns
    model, args and perhaps kwargs), a local Hugging Face directory, or a **.pt2** file.

    **Exit codes:** 0 good, 1 the verdict is no, 2 wrong use or input, 3 inconclusive, 4 a fault of
    graphopt, 130 interrupted.
    """


def main() -> None:
    """The entry point of the ``graphopt`` command."""
    app(prog_name="graphopt")
