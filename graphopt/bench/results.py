"""A case's row: sides, ratios, noise and energy, JSON-ready."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graphopt.bench.side import AGAIN, Side, Times
from graphopt.observe.energy import Counter
from graphopt.runtime.rounds import noise_floor, quartiles, ratio, verdict


def results(own: Side, sides: Sequence[Side], times: Times, meter: Counter | None) -> dict[str, Any]:
    """What was measured of the sides.

    Args:
        own: graphopt's.
        sides: the peers', all modes.
        times: of those that were timed.
        meter: counts the device's energy; None where it does not tell.
    """
    best = _best(sides, times)
    narrow = any(side.loss is not None for side in (own, *sides))
    counted = {own.key, *(side.key for side in best.values())} & times.warm.keys()
    rows = [{**_side(side, times), "counts": side.key in counted} for side in (own, *sides)]
    if meter is not None and not times.interrupted:
        for row, side in zip(rows, (own, *sides), strict=True):
            if row["counts"] and side.run is not None:
                row["joules"] = _digits(meter.joules(side.run), 4)
    return {
        "sides": rows,
        **_ratios("", own, best, times.warm, narrow),
        **_ratios("cold_", own, best, times.cold, narrow),
        "rounds_done": len(times.warm.get(own.key, ())) // 2,
        "interrupted": times.interrupted,
    }


def _best(sides: Sequence[Side], times: Times) -> dict[str, Side]:
    """The fastest mode of every peer that was timed, and loses no more than the case allows."""
    right = (side for side in sides if side.key in times.warm and not side.wrong)
    timed = sorted(right, key=times.median, reverse=True)
    return {side.peer: side for side in timed}


def _ratios(
    prefix: str, own: Side, best: dict[str, Side], times: dict[str, list[float]], narrow: bool
) -> dict[str, Any]:
    """A/A, and every peer's best mode, to graphopt; empty where nothing was timed."""
    if not times:
        return {}
    again = ratio(times[AGAIN], times[own.key])
    floor = round(noise_floor(again), 3)
    ratios = {}
    for peer, side in sorted(best.items()):
        found = ratio(times[side.key], times[own.key])
        ratios[peer] = {**found, "verdict": verdict(found, floor), "mode": side.mode}
        ratios[peer] |= {"precision": side.precision} if narrow else {}
    return {f"{prefix}noise": {**again, "floor": floor}, f"{prefix}ratio": ratios}


def _side(side: Side, times: Times) -> dict[str, Any]:
    row: dict[str, Any] = {
        "peer": side.peer,
        "mode": side.mode,
        "build_s": side.build_s,
        "error": None if side.error is None or not math.isfinite(side.error) else _digits(side.error, 4),
    }
    if side.loss is not None and side.cosine is not None and math.isfinite(side.loss):
        row |= {"precision": side.precision, "loss": _digits(side.loss, 4), "cosine": _digits(side.cosine, 7)}
    row |= {key: value for key in ("wrong", "failed") if (value := getattr(side, key))}
    for prefix, found in (("", times.warm), ("cold_", times.cold)):
        if side.key in found:
            row[f"{prefix}ms"] = quartiles(found[side.key])
            row[f"{prefix}times_ms"] = [_digits(value, 5) for value in found[side.key]]
    return row


def _digits(value: float, count: int) -> float:
    return float(f"{value:.{count}g}")
