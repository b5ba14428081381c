"""Causes: what the facts say about why something is different from the lock, the nearest cause first."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.observe import summary

Facts = Mapping[str, Any]
_SHOWN = 3  # causes of one kind; the rest is a number
_LONGEST = 200  # characters of a remark: an executor that fails may tell its whole stack


@dataclass(frozen=True)
class Place:
    """A place of the captured graph whose calls are not as many as in the lock.

    Args:
        name: the module's path with stars for numbers, and the op.
        before: calls in the lock.
        after: calls now.
        module: the concrete module that has too many, when that can be told.
        source: the user's ``file:line`` there.
    """

    name: str
    before: int
    after: int
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.module, self.source)))
        words = f"the model now calls {self.name} {self.after} times, not {self.before}"
        return f"{words} ({where})" if where else words


def changed(locked: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two tables; None stands for what is not there."""
    keys = sorted({*locked, *now})
    return {key: (locked.get(key), now.get(key)) for key in keys if locked.get(key) != now.get(key)}


def places(locked: Facts, now: Facts) -> list[Place]:
    """The places of the captured graph with more or fewer calls, the largest differences first."""
    rows = []
    for name, (before, after) in changed(locked["captured"]["places"], now["captured"]["places"]).items():
        module, source = _surplus(now.get("lines", {}).get(name, {}), (after or 0) > (before or 0))
        rows.append(Place(name, before or 0, after or 0, module, source))
    return sorted(rows, key=lambda row: (row.after <= row.before, -abs(row.after - row.before), row.name))


def _surplus(modules: Mapping[str, Sequence[Any]], more: bool) -> tuple[str, str]:
    """The module that calls more often than its siblings do, and its line; else the line of any."""
    if not modules or not more:
        return "", ""
    counts = sorted(count for count, _ in modules.values())
    usual = counts[(len(counts) - 1) // 2]
    for module, (count, source) in modules.items():
        if count > usual:
            return module, source
    module, (_, source) = next(iter(modules.items()))
    return (module if len(modules) == 1 else ""), source


def in_the_model(locked: Facts, now: Facts) -> tuple[list[str], str]:
    """What the captured graph says, in words, and the line of the first difference."""
    rows = places(locked, now)
    words = [str(row) for row in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        words.append(f"and {len(rows) - _SHOWN} more places of the model differ")
    return words, next((row.source for row in rows if row.source), "")


def around(locked: Facts, now: Facts, passes: Sequence[str] = ()) -> list[str]:
    """What changed around the model: versions, files, and of the passes asked about, their sources.

    Args:
        locked: facts of the lock.
        now: facts of now.
        passes: names of the passes that the difference is about; none asks about all.
    """
    words = []
    for name, (before, after) in changed(locked["passes"], now["passes"]).items():
        if passes and name not in passes:
            continue
        if after is None:
            words.append(f"{name} does not run any more")
        else:
            words.append(f"{name} is new" if before is None else f"the source of {name} changed")
    versions = changed(locked["versions"], now["versions"])
    if versions:
        words.append(
            "after "
            + ", ".join(f"{name} {a or 'none'} -> {b or 'none'}" for name, (a, b) in versions.items())
        )
    files = [
        name
        for name, (a, b) in changed(locked["sources"], now["sources"]).items()
        if b is not None and a is not None
    ]
    if files:
        words.append(f"{listed(files)} changed")
    inputs = changed(locked["inputs"], now["inputs"])
    types = [
        f"{name} was {_type(a)}, is {_type(b)}" for name, (a, b) in inputs.items() if _type(a) != _type(b)
    ]
    return words + ([f"other inputs: {listed(types)}"] if types else [])


def _type(described: str | None) -> str:
    return (described or "not there").rpartition(" ")[0] or "not there"


def remarks(locked: Facts, now: Facts, pass_name: str) -> list[dict[str, Any]]:
    """The remarks of a pass, or a stage, on what it missed, that the lock does not have or has fewer of."""
    known: dict[str, int] = {}
    for row in locked["remarks"]:
        if row["pass"] == pass_name:
            known[summary.unnumbered(row["reason"])] = row["count"]
    rows = [row for row in now["remarks"] if row["pass"] == pass_name]
    return [row for row in rows if row["count"] > known.get(summary.unnumbered(row["reason"]), 0)]


def remark_words(row: Mapping[str, Any]) -> str:
    """A remark in words: reason, first node, place and price."""
    where = " ".join(filter(None, (row["source"], row["module"])))
    price = f"; {summary.size(row['bytes'])} and {summary.ms(row['ms'])} ms a call" if row["bytes"] else ""
    times = f" ({row['count']} times)" if row["count"] > 1 else ""
    node = f", first at {row['node']}" if row["node"] else ""
    reason = textwrap.shorten(row["reason"], _LONGEST, placeholder=" ...")
    return f"{row['pass']}: {reason}{times}{node}{f' ({where})' if where else ''}{price}"


def weights(locked: Facts, now: Facts) -> list[str]:
    """Which weights are not those of the lock, in words."""
    rows = changed(locked["weights"], now["weights"])
    if not rows:
        return []
    gone = sum(after is None for _, after in rows.values())
    names = [name for name, (_, after) in rows.items() if after is not None] or list(rows)
    others = f"{len(rows) - gone} of {len(now['weights'])} weights are other than in the lock"
    return [f"{others}{f', {gone} are gone' if gone else ''}: {listed(names)}"]


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
