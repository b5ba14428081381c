"""What rows say together: speed-ups, their mean, the worst, and every case that lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.observe.summary import error

Row = dict[str, Any]

VERDICTS = {
    "faster": "graphopt is faster",
    "level": "level: within the noise",
    "slower": "graphopt is slower",
}


@dataclass(frozen=True)
class Against:
    """How graphopt fares against one peer.

    Args:
        peer: the peer.
        mean: geometric mean of the speed-ups, over all cases in which both sides are right.
        worst: the lowest speed-up.
        worst_case: where.
        verdicts: cases by verdict.
    """

    peer: str
    mean: float
    worst: float
    worst_case: str
    verdicts: dict[str, int]

    @property
    def cases(self) -> int:
        """How many there are."""
        return sum(self.verdicts.values())


@dataclass(frozen=True)
class Loss:
    """A case that graphopt lost, or in which it gave no answer.

    Args:
        case: which.
        peer: to whom; "" where it failed.
        reason: in words.
        command: that shows it again.
    """

    case: str
    peer: str
    reason: str
    command: str


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows of cases that did not fail."""
    return [row for row in rows if "failed" not in row]


def peers(rows: Iterable[Row]) -> list[str]:
    """Every peer that a ratio exists for, in order of appearance."""
    return list(dict.fromkeys(peer for row in measured(rows) for peer in row["ratio"]))


def against(rows: Sequence[Row]) -> list[Against]:
    """How graphopt fares against each peer, over the cases that both ran right."""
    found = []
    for peer in peers(rows):
        ratios = {row["case"]: row["ratio"][peer] for row in measured(rows) if peer in row["ratio"]}
        worst = min(ratios, key=lambda case: ratios[case]["ratio"])
        verdicts = dict.fromkeys(VERDICTS, 0)
        for ratio in ratios.values():
            verdicts[ratio["verdict"]] += 1
        mean = math.exp(sum(math.log(ratio["ratio"]) for ratio in ratios.values()) / len(ratios))
        found.append(Against(peer, mean, ratios[worst]["ratio"], worst, verdicts))
    return found


def losses(rows: Sequence[Row]) -> list[Loss]:
    """Every case in which a peer is faster, graphopt is wrong, or nothing could be measured."""
    found = []
    for row in rows:
        if "failed" in row:
            found.append(Loss(row["case"], "", f"not measured: {row['failed']['message']}", row["command"]))
            continue
        own = row["sides"][0]
        if "wrong" in own or "failed" in own:
            reason = f"graphopt is wrong: {own['wrong']}" if "wrong" in own else own["failed"]
            found.append(Loss(row["case"], "", reason, row["command"]))
        for name, kind in (("ratio", ""), ("cold_ratio", ", with a cold L2")):
            for peer, ratio in row.get(name, {}).items():
                if ratio["verdict"] == "slower":
                    reason = f"takes {1 / ratio['ratio']:.2f} times as long as {peer}{kind}: {speed(ratio)}"
                    found.append(Loss(row["case"], peer, reason, row["commands"][peer]))
    return found


def excluded(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Sides of peers that are not counted: case, side, and why."""
    return [
        (row["case"], label(side), f"{what}: {side[what]}")
        for row in measured(rows)
        for side in row["sides"][1:]
        for what in ("wrong", "failed")
        if what in side
    ]


def missing(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Peers that were asked for and are not there: why, and the command that brings them."""
    found = {}
    for row in measured(rows):
        for peer, what in row["missing"].items():
            found[peer] = (what["reason"], what["install"])
    return found


def unloaded(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Cases whose artifact was not loaded, and why."""
    costs = ((row["case"], row["optimize"]) for row in measured(rows))
    return [(case, cost["load_left_out"]) for case, cost in costs if "load_left_out" in cost]


def label(side: dict[str, Any]) -> str:
    """A side by its peer and mode; one that is exact, where a loss is allowed, is called so."""
    exact = "exact" if side.get("precision") == "exact" else ""
    return ", ".join(filter(None, (side["peer"], side["mode"], exact)))


def speed(ratio: dict[str, Any]) -> str:
    """A ratio as a factor with its interval."""
    return f"{ratio['ratio']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def accuracy(side: dict[str, Any]) -> str:
    """How far a side is from float64: its largest error, or what it loses where a loss is allowed."""
    if "loss" not in side:
        return error(side["error"])
    return f"loss {side['loss']:.2g}, cosine {side['cosine']:.5f}"


def floor(row: Row) -> str:
    """A row's noise floor in words."""
    noise = row.get("noise")
    return f"±{100 * noise['floor']:.1f}%" if noise else ""
