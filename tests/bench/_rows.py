"""Rows as a run would write them, from a few numbers."""

from __future__ import annotations

import random
from typing import Any

from graphopt.bench.case import failed_row
from graphopt.bench.results import results
from graphopt.bench.rows import FORMAT, SCHEMA
from graphopt.bench.setting import Case, Setting, command_of
from graphopt.bench.side import AGAIN, Side, Times


def drawn(median: float, spread: float, seed: int, count: int = 40) -> list[float]:
    source = random.Random(seed)
    return [median * source.lognormvariate(0, spread) for _ in range(count)]


def row(
    case: Case,
    own: float,
    peers: dict[str, float],
    *,
    spread: float = 0.01,
    broken: tuple[Side, ...] = (),
    cold: bool = False,
) -> dict[str, Any]:
    """A measured row: medians in milliseconds of graphopt and its peers, ``"name (mode)"``."""
    mine = Side("graphopt", "ort", error=1e-7)
    sides = [Side(name.partition(" (")[0], name.partition(" (")[2].rstrip(")"), error=2e-7) for name in peers]
    times = {side.key: drawn(peers[side.key], spread, seed) for seed, side in enumerate(sides)}
    times |= {mine.key: drawn(own, spread, 90), AGAIN: drawn(own, spread, 91)}
    measured = Times(times, {key: [2 * t for t in taken] for key, taken in times.items()} if cold else {})
    setting = Setting(tuple(dict.fromkeys(side.peer for side in sides)) or ("eager",))
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "case": case.name,
        "spec": case.spec,
        "sizes": dict(case.sizes),
        "dtype": case.dtype or "float32",
        "device": "cpu",
        "seed": 0,
        "inputs": ["float32 [2, 3]"],
        "model": "zoo.Block",
        "lengths": None,
        **results(mine, [*sides, *broken], measured, None),
        "missing": {"tensorrt": {"reason": "needs a CUDA GPU", "install": "pip install torch-tensorrt"}},
        "optimize": {
            "cold_s": 2.0,
            "warm_s": 1.0,
            "peak_bytes": 3 * 2**20,
            "weights_bytes": 2**20,
            "ops": {},
        },
        "device_name": "Some CPU",
        "driver": "",
        "threads": 2,
        "rounds": 20,
        "seconds": None,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "commit": "abc1234+",
        "date": "2026-11-22",
        "command": command_of(case, setting),
        "commands": {name: command_of(case, Setting((name,))) for name in setting.against},
    }


def failing(case: Case, message: str) -> dict[str, Any]:
    return failed_row(case, Setting(), {"message": message, "code": 2})
