"""``graphopt.lock``: what is true of every model of a project, one readable, sorted file in the repository.

It is JSON, one value a line, keys in order, so that a change of a model is a change of a few lines, and two
branches that touch different models merge. ``docs/gate.md`` has the schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from graphopt.errors import InputError
from graphopt.observe.files import write_text
from graphopt.observe.summary import jsonable

FORMAT, SCHEMA = "graphopt-lock", 1
NAME = "graphopt.lock"
_CONFLICT = ("<<<<<<<", ">>>>>>>", "|||||||")
_SECTIONS = ("config", "facts")
# Facts that are measured, and how far two measurements may be apart for the older one to stay written down: a
# part of it, and as much besides (opening a tiny model is a few milliseconds, or a few more times that on a
# busy machine; an allocator takes memory by the megabyte).
_MEASURED = {
    "ms": (0.5, 0.0),
    "peak_bytes": (0.1, 16 * 2**20),
    "load_ms": (0.5, 50.0),
    "error": (1.0, 0.0),
    "error_original": (1.0, 0.0),
}

# What every entry has among its facts, and what is in each.
_FACTS: dict[str, tuple[str, ...]] = {
    "captured": ("places", "flops", "bytes"),
    "cost": ("flops", "bytes", "ms"),
    "fusions": (),
    "gpu": ("launches", "fused", "without_kernel", "compiled"),
    "host": ("copies", "syncs"),
    "inputs": (),
    "latency": ("baseline", "ratio", "low", "high", "baseline_ms"),
    "machine": (),
    "memory": ("peak",),
    "metric": ("name", "optimized"),
    "numerics": ("error",),
    "outputs": ("type",),
    "passes": (),
    "plan": ("chosen", "regions", "kernels", "launches", "copies", "syncs", "cuda_graph_coverage", "opset"),
    "remarks": ("pass", "reason", "count", "source", "module", "node", "bytes", "ms"),
    "reverted": (),
    "serve": ("artifact_bytes",),
    "sources": (),
    "undone": (),
    "versions": (),
    "weights": (),
}
_RATIO = dict.fromkeys(("ratio", "low", "high"))
_LISTS = {"outputs", "remarks", "undone"}  # of rows, which have the keys
_MAY_BE_NULL = {"gpu", "latency", "metric", "plan", "serve"}

Entry = dict[str, Any]


def read(path: Path) -> dict[str, Entry]:
    """The entries of a lock, by name of the model.

    Raises:
        InputError: it is missing, or is no lock that this version can read; how to mend it is said.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"{path.name} does not exist",
            where=str(path.absolute()),
            hint="write it with: graphopt lock SPEC",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read: {error}", where=str(path.absolute())) from error
    return _entries(text, path)


def _entries(text: str, path: Path) -> dict[str, Entry]:
    conflicts = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith(_CONFLICT)]
    if conflicts:
        raise InputError(
            f"{path.name} holds the markers of a merge conflict",
            where=f"{path.absolute()}:{conflicts[0]}",
            hint="take either side (git checkout --ours -- "
            f"{path.name}), then bring it up to date with: graphopt check --update",
        )
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _bad(path, f"is damaged: {error}", _AGAIN) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _bad(path, "is no lock of graphopt's", "name another file with --lock")
    schema = found.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise _bad(path, f"has schema {schema}, this graphopt reads {SCHEMA}", "install a newer graphopt")
    models = found.get("models")
    if schema != SCHEMA or not isinstance(models, dict):
        raise _bad(path, f"is damaged: schema {schema!r}, models {type(models).__name__}", _AGAIN)
    for name, entry in models.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), dict) for key in _SECTIONS):
            raise _bad(path, f"is damaged: the entry {name!r} lacks {' or '.join(_SECTIONS)}", _AGAIN)
        if lacks := missing(entry["facts"]):
            raise _bad(path, f"is damaged: the entry {name!r} lacks {lacks} among its facts", _AGAIN)
    return models


def missing(facts: Mapping[str, Any]) -> str:
    """The first fact that every entry has and this one does not; "" when it has all."""
    for section, keys in _FACTS.items():
        found = facts.get(section)
        if found is None and section in _MAY_BE_NULL and section in facts:
            continue
        if not isinstance(found, list if section in _LISTS else Mapping):
            return section
        for row in found if section in _LISTS else [found]:
            for key in keys:
                if not isinstance(row, Mapping) or key not in row:
                    return f"{section}.{key}"
    for row in facts["outputs"]:
        if "digest" not in row and not {"norm", "sketch"} <= row.keys():
            return "outputs.sketch"
    control = (facts["latency"] or {}).get("control", _RATIO)  # a lock may have none
    return "" if isinstance(control, Mapping) and _RATIO.keys() <= control.keys() else "latency.control"


_AGAIN = "take it from version control, or write it again with: graphopt lock SPEC"


def _bad(path: Path, what: str, hint: str) -> InputError:
    return InputError(f"{path.name} {what}", where=str(path.absolute()), hint=hint)


def dumps(entries: Mapping[str, Entry]) -> str:
    """The text of a lock with these entries."""
    found = jsonable({"format": FORMAT, "schema": SCHEMA, "models": dict(entries)})
    return json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """Put a lock in place in one step; what was there before stays as it is should that fail.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, dumps(entries))


def matching(entries: Mapping[str, Entry], wanted: Sequence[str], path: Path) -> list[str]:
    """The names of the entries that are wanted: by name, or by a pattern with ``*`` and ``?``; none is all.

    Raises:
        InputError: the lock has no entries, or one of the wanted matches none.
    """
    if not entries:
        raise InputError(
            f"{path.name} has no entries, so there is nothing to check",
            where=str(path.absolute()),
            hint="add a model with: graphopt lock SPEC",
        )
    names: dict[str, None] = {}
    for pattern in wanted or ("*",):
        fits = [name for name in entries if name == pattern or fnmatchcase(name, pattern)]
        if not fits:
            raise InputError(
                f"{pattern!r} matches no model of {path.name}",
                where=str(path.absolute()),
                hint=f"it has: {', '.join(entries)}; add one with: graphopt lock {pattern}",
            )
        names.update(dict.fromkeys(fits))
    return list(names)


def settled(now: Any, locked: Any, key: str = "") -> Any:
    """Facts as a lock takes them: what was measured, and differs by no more than noise, stays as it was.

    Without it every update would change every measured line, and hide those that mean something.
    """
    if isinstance(now, Mapping) and isinstance(locked, Mapping):
        if key == "latency" and _overlap(now, locked):
            return dict(locked)
        return {name: settled(value, locked.get(name), name) for name, value in now.items()}
    if key == "remarks" and isinstance(locked, Sequence):
        known = {(row["pass"], row["reason"]): row for row in locked}
        return [settled(row, known.get((row["pass"], row["reason"])), "remark") for row in now]
    numbers = isinstance(now, int | float) and isinstance(locked, int | float)
    if key in _MEASURED and numbers:
        part, besides = _MEASURED[key]
        if abs(now - locked) <= part * abs(locked) + besides:
            return locked
    return now


def _overlap(now: Mapping[str, Any], locked: Mapping[str, Any]) -> bool:
    """True where noise explains every difference: the same sides, and intervals that overlap."""
    if ("control" in now) != ("control" in locked):
        return False
    ratios = [(now, locked), *([(now["control"], locked["control"])] if "control" in now else [])]
    try:
        same = now["baseline"] == locked["baseline"]
        return same and all(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in ratios)
    except (KeyError, TypeError):
        return False
