"""How far the work is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def bar(quiet: bool, *, left: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, gone when the work is done.

    Args:
        quiet: show nothing.
        left: show also how much time is left; for work whose parts take about as long as they say.

    Yields:
        A function of (what is being done, fraction done), as ``graphopt.optimize`` calls it.
    """
    console = Console(stderr=True)
    columns = [SpinnerColumn(), TextColumn("{task.description:<30}"), BarColumn(), TimeElapsedColumn()]
    if left:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as shown:
        task = shown.add_task("load", total=1.0)
        yield lambda name, done: shown.update(task, description=name, completed=done)
