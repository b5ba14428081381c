"""Results on disk: what was found and timed, to be judged again under other budgets; nothing is run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import InputError
from graphopt.gate.budgets import Budgets
from graphopt.gate.finding import Finding, Result, exit_code, worst
from graphopt.gate.judge import judge
from graphopt.gate.lock import missing
from graphopt.observe.summary import jsonable

FORMAT, SCHEMA = "graphopt-check", 1


def to_dict(results: Sequence[Result], budgets: Mapping[str, Budgets]) -> dict[str, Any]:
    """Results with the budgets that they were judged under, by model, as strict JSON has it."""
    found: dict[str, Any] = jsonable(
        {
            "format": FORMAT,
            "schema": SCHEMA,
            "exit_code": worst(exit_code(r, budgets[r.model].on_inconclusive) for r in results),
            "results": [result_to_dict(result, budgets[result.model]) for result in results],
        }
    )
    return found


def result_to_dict(result: Result, budgets: Budgets) -> dict[str, Any]:
    """One result with its budgets."""
    return {
        "model": result.model,
        "verdict": result.verdict,
        "budgets": budgets.to_dict(),
        "findings": [finding.to_dict() for finding in result.findings],
        "locked": result.locked,
        "facts": result.facts,
        "samples": result.samples,
        "waiting": result.waiting,
        "cached": result.cached,
        "seconds": result.seconds,
    }


def result_of(row: Mapping[str, Any]) -> Result:
    """What ``result_to_dict`` wrote."""
    findings = [Finding(**{**finding, "because": tuple(finding["because"])}) for finding in row["findings"]]
    kept = ("locked", "facts", "samples", "waiting", "cached", "seconds")
    return Result(row["model"], findings, **{name: row[name] for name in kept})


def dumps(results: Sequence[Result], budgets: Mapping[str, Budgets]) -> str:
    """Results as JSON text."""
    return json.dumps(to_dict(results, budgets), indent=1, allow_nan=False) + "\n"


def judge_again(path: Path, overrides: Mapping[str, Any]) -> tuple[list[Result], dict[str, Budgets]]:
    """Saved results under the budgets that they were saved with, but for those given now.

    Raises:
        InputError: the file cannot be read or holds something else, or a budget is unknown.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["format"], found["schema"]) != (FORMAT, SCHEMA):
            raise ValueError(f"its format is {found['format']} {found['schema']}")
        rows = [(result_of(row), row["budgets"]) for row in found["results"]]
        for result, _ in rows:
            if lacks := missing(result.locked["facts"]) or missing(result.facts):
                raise ValueError(f"{result.model} lacks {lacks} among its facts")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} holds no results: {error}", where=str(path), hint=_HINT) from error
    budgets = {
        result.model: Budgets.of((str(path), known), ("the options", overrides)) for result, known in rows
    }
    return [judge(result, budgets[result.model]) for result, _ in rows], budgets


_HINT = "write it with: graphopt check --save FILE"
