"""The command line: one file a command, shared parts in the files that begin with an underscore.

A command's file is imported when the command runs: most of them import PyTorch, for which neither
``graphopt --help`` nor somebody who mistyped a name should have to wait.
"""

from __future__ import annotations

import ast
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# Each a function in the file of its name.
COMMANDS = ("optimize", "explain", "bisect", "bench", "lock", "check")
_SETTINGS: dict[str, Any] = {
    "rich_markup_mode": "markdown",
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Commands(TyperGroup):
    """The commands: listed by what their files say, without importing them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the arguments name, loaded."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name and found else found, rest


app = typer.Typer(name="graphopt", cls=_Commands, no_args_is_help=True, **_SETTINGS)


def _load(name: str) -> Any:
    alone = typer.Typer(**_SETTINGS)
    alone.command(name)(getattr(importlib.import_module(f"graphopt.cli.{name}"), name))
    return typer.main.get_command(alone)


def _help(name: str) -> str:
    """The docstring of a command, out of its file."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return next(ast.get_docstring(node) or "" for node in functions if node.name == name)


for _name in COMMANDS:
    app.command(_name, help=_help(_name))(lambda: None)


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
