"""The options of the gate's budgets, made from the budgets themselves, so that none is forgotten."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from graphopt.errors import InputError
from graphopt.gate.budgets import FIELDS, Budgets

_HELP = {
    "max_error": "Largest error of the outputs relative to float64.",
    "max_drift": "How far the model's own outputs may be from those of the lock, relative.",
    "metric": "package.module:function of a model, more is better.",
    "max_metric_loss": "How much less of the metric than the original and the lock have.",
    "baseline": "What latency is compared with: eager, or an executor.",
    "max_latency_ratio": "Time, divided by that of the baseline.",
    "max_slowdown": "How much slower than in the lock, against the captured graph in the same run.",
    "max_baseline_slowdown": "How much slower than in the lock, against the baseline.",
    "min_throughput": "Items a second.",
    "max_memory": "Bytes at the peak, by accounting.",
    "max_memory_growth": "How much memory may grow against the lock.",
    "max_size": "Bytes written of the model.",
    "max_size_growth": "How much that may grow against the lock.",
    "max_load_ms": "Milliseconds until a new process has it open.",
    "max_cost_growth": "How much operations and memory traffic may grow.",
    "seconds": "How long to time at most.",
    "on_inconclusive": "exit (with code 3), pass or fail.",
}


def with_budgets(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option a budget; it gets those that were given as ``given``, a table."""
    names = list(FIELDS)

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        given = {name: value for name in names if (value := options.pop(name)) is not None}
        command(**options, given=given)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    added = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_option(name)
        )
        for name in names
    ]
    parameters = [*own, *added]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__  # typer would look behind it
    return wrapped


def _option(name: str) -> Any:
    default = getattr(Budgets(), name)
    text = f"{_HELP[name]} [default: {'none' if default is None else default}]"
    option = typer.Option(
        f"--{name.replace('_', '-')}", show_default=False, help=text, rich_help_panel="Budgets"
    )
    return Annotated[str | None, option]


def parsed(given: dict[str, str]) -> dict[str, Any]:
    """The values of options as the budgets take them: numbers, or ``off``.

    Raises:
        InputError: one is neither.
    """
    found: dict[str, Any] = {}
    for name, text in given.items():
        if text == "off":
            found[name] = None
        elif isinstance(getattr(Budgets(), name), str) or name == "metric":
            found[name] = text
        else:
            try:
                found[name] = float(text)
            except ValueError:
                where = f"--{name.replace('_', '-')} {text}"
                raise InputError(f"{text!r} is no number", where=where, hint="a number, or off") from None
    return found
