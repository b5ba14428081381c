"""From errors to exit codes: one clear error on stderr, and a traceback only for who asks."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.text import Text

from graphopt.errors import GraphoptError, LoweringError

GOOD, NO, WRONG_USE, INCONCLUSIVE, FAULT, INTERRUPTED = 0, 1, 2, 3, 4, 130


def exit_code(error: GraphoptError) -> int:
    """1 when the verdict is no (no executor gives the right answer), 2 for wrong use or input."""
    return NO if isinstance(error, LoweringError) else WRONG_USE


@contextlib.contextmanager
def told(debug: bool) -> Iterator[None]:
    """Around the body of a command: whatever it raises becomes one error on stderr and an exit code.

    Args:
        debug: print the traceback first.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _say("interrupted: nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # who read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(GOOD) from None
    except GraphoptError as error:
        if debug:
            traceback.print_exc()
        _say(str(error))
        raise typer.Exit(exit_code(error)) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        what = str(error).strip().splitlines() or [""]
        _say(f"graphopt failed: {type(error).__name__}: {what[0]}")
        if not debug:
            _say("  try: run again with --debug, and report the traceback", prefix="")
        raise typer.Exit(FAULT) from None


def _say(text: str, prefix: str = "error: ") -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((prefix, "bold red"), text))
