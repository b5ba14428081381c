"""Budgets: what a model may cost and how far it may be off, from four places, the later one wins.

The defaults here, ``[tool.graphopt.check]`` of pyproject.toml, ``budgets`` of the model in the lock, and the
options of the command.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.errors import InputError


@dataclass(frozen=True)
class Budgets:
    """What a check holds a model to. None switches a budget off.

    A growth is a fraction of what the lock has: 0.1 allows a tenth more.

    Args:
        max_error: largest error of the optimized outputs relative to float64 (``compiler/tolerance.py`` has
            the measure); without it twice the original's own error, as for every rewrite.
        max_drift: how far the original's outputs in float64 may be from those of the lock on the same
            inputs, as a relative distance in the 2-norm; what weights and code do shows here.
        metric: ``package.module:function``, called with the model and with the optimized model; returns a
            number, of which more is better.
        max_metric_loss: how much less the optimized model may reach than the original, and than the lock has.
        baseline: what latency is compared with in the same run: ``eager`` (the model as it is) or an
            executor.
        max_latency_ratio: the time of the optimized model, divided by that of the baseline.
        max_slowdown: how much larger than in the lock the ratio to the control may be, as a fraction: to the
            graph as captured, on the executors that run the optimized one; to the baseline, where there is no
            control.
        max_baseline_slowdown: likewise, of the ratio to the baseline; off where ``max_slowdown`` is.
        min_throughput: items a second; an item is a row of the first input.
        max_memory: bytes at the peak, by accounting.
        max_memory_growth: of these.
        max_size: bytes of what ``graphopt optimize -o`` writes of the model.
        max_size_growth: of these.
        max_load_ms: milliseconds until a new process has the written model open.
        max_cost_growth: of operations and of memory traffic of a call.
        seconds: how long to time; the rounds end sooner when they can tell.
        on_inconclusive: what a check does that could not tell: ``exit`` (with code 3), ``pass`` or ``fail``.
    """

    max_error: float | None = None
    max_drift: float | None = 1e-4
    metric: str | None = None
    max_metric_loss: float | None = 1e-3
    baseline: str = "eager"
    max_latency_ratio: float | None = 1.05
    max_slowdown: float | None = 0.04
    max_baseline_slowdown: float | None = 0.15
    min_throughput: float | None = None
    max_memory: float | None = None
    max_memory_growth: float | None = 0.1
    max_size: float | None = None
    max_size_growth: float | None = 0.1
    max_load_ms: float | None = None
    max_cost_growth: float | None = 0.01
    seconds: float = 20.0
    on_inconclusive: str = "exit"

    @staticmethod
    def of(*layers: tuple[str, Mapping[str, Any]]) -> Budgets:
        """The budgets that layers of settings make, each with the place it comes from; the later one wins.

        Raises:
            InputError: a setting is unknown, or its value is none that it can have; the place is named.
        """
        found: dict[str, Any] = {}
        for where, settings in layers:
            if not isinstance(settings, Mapping):
                raise InputError("the budgets are no table", where=where)
            found |= {name: _checked(name, value, where) for name, value in settings.items()}
        return Budgets(**found)

    def to_dict(self) -> dict[str, Any]:
        """The budgets as JSON-ready values."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(Budgets)}
_TEXTS = {"metric", "baseline", "on_inconclusive"}
_REQUIRED = {"baseline", "seconds", "on_inconclusive"}
_CHOICES = ("exit", "pass", "fail")


def _checked(name: str, value: Any, where: str) -> Any:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the budgets are: {', '.join(FIELDS)}"
        raise InputError(f"the budget {name!r} is unknown", where=where, hint=hint)
    if value is None or value is False:  # TOML has no null: `max_slowdown = false` switches it off
        if name in _REQUIRED:
            raise InputError(f"{name} cannot be switched off", where=where)
        return None
    if name in _TEXTS:
        if not isinstance(value, str) or (name == "on_inconclusive" and value not in _CHOICES):
            wanted = f"one of {', '.join(_CHOICES)}" if name == "on_inconclusive" else "a text"
            raise InputError(f"{name} = {value!r} is not {wanted}", where=where)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{name} = {value!r} is not a number of at least 0", where=where)
    return float(value)
