"""Rows as one page: tables and plots in a single file that opens anywhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import graphopt.observe
from graphopt.bench import summary
from graphopt.bench.plot import Bar, Line, bars, lines
from graphopt.observe.files import write_text
from graphopt.observe.summary import ms, size, times

Row = dict[str, Any]

_COSTS = {"cold_s": "cold", "warm_s": "warm"}


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Write the page.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, render(rows))


def render(rows: Sequence[Row]) -> str:
    """The page as text. Names of cases and what errors say are escaped."""
    good = summary.measured(rows)
    own = [row["sides"][0] for row in good]
    return _template().render(
        rows=good,
        count=len(rows),
        right=sum("ms" in side for side in own),
        peers=summary.peers(rows),
        together=summary.against(rows),
        losses=summary.losses(rows),
        excluded=summary.excluded(rows),
        missing=summary.missing(rows),
        unloaded=summary.unloaded(rows),
        speed=_speed(good),
        cold=_speed(good, "cold_"),
        growth=growth(good),
        environments=_environments(rows),
    )


@functools.cache
def _template() -> jinja2.Template:
    folders = [Path(__file__).parent, Path(graphopt.observe.__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {helper.__name__: helper for helper in (ms, size, times)}
    environment.globals |= {
        "label": summary.label,
        "speed_text": summary.speed,
        "floor": summary.floor,
        "accuracy": summary.accuracy,
    }
    return environment.get_template("page.html.jinja")


def _colours(rows: Sequence[Row]) -> dict[str, int]:
    """An index into the colours for graphopt and every peer, the same in all plots."""
    return {name: index for index, name in enumerate(["graphopt", *summary.peers(rows)])}


def _speed(rows: Sequence[Row], prefix: str = "") -> Markup | None:
    """The speed-ups over every peer, case by case."""
    colours, groups = _colours(rows), []
    for row in rows:
        found = [
            Bar(
                f"{peer}, {ratio['mode']}" if ratio["mode"] else peer,
                ratio["ratio"],
                ratio["low"],
                ratio["high"],
                colours[peer],
                row[f"{prefix}noise"]["floor"],
                f"{summary.speed(ratio)}: {summary.VERDICTS[ratio['verdict']]}",
            )
            for peer, ratio in row.get(f"{prefix}ratio", {}).items()
        ]
        if found:
            groups.append((row["case"], found))
    return bars(groups, "how many times as long as graphopt each peer takes") if groups else None


def growth(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """What grows with a size: latency and the cost of optimizing, over cases that differ in it alone.

    Returns:
        For every such size of every such group: a heading, and plots with their captions.
    """
    found = []
    names = dict.fromkeys(name for row in rows for name in row["sizes"])
    for name in names:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if name in row["sizes"] and "ms" in row["sides"][0]:
                groups.setdefault(_besides(row, name), []).append(row)
        for group in groups.values():
            if len({row["sizes"][name] for row in group}) > 1:
                group.sort(key=lambda row: row["sizes"][name])
                found.append((_heading(group[0], name), _growth(group, name)))
    weights = sorted({(row["optimize"]["weights_bytes"], row["optimize"]["cold_s"]) for row in rows})
    if len({size for size, _ in weights if size}) > 1:
        points = [(size / 1e6, seconds) for size, seconds in weights if size and seconds]
        plot = lines([Line("cold", points, 0)], "weights, MB", "s", "seconds to optimize by weights")
        found.append(("All cases", [("Seconds to optimize, cold, against the weights", plot)]))
    return found


def _besides(row: Row, name: str) -> tuple[Any, ...]:
    """All that a case was asked for but one size."""
    sizes = tuple(sorted((key, value) for key, value in row["sizes"].items() if key != name))
    lengths = row["lengths"]["kind"] if row["lengths"] else ""
    return row["spec"], sizes, row["dtype"], row.get("precision"), row["device"], row["device_name"], lengths


def _heading(row: Row, name: str) -> str:
    others = [f"{key}={value}" for key, value in row["sizes"].items() if key != name]
    precision = [row["precision"]] if "precision" in row else []
    return f"{row['spec']}, {', '.join([*others, row['dtype'], *precision, row['device']])}: by {name}"


def _growth(group: Sequence[Row], name: str) -> list[tuple[str, Markup]]:
    colours = _colours(group)
    latency: dict[str, list[tuple[float, float]]] = {}
    for row in group:
        for side in row["sides"]:
            if side["counts"]:
                latency.setdefault(side["peer"], []).append((row["sizes"][name], side["ms"]["median"]))
    costs = {
        kind: [(row["sizes"][name], row["optimize"][kind]) for row in group if kind in row["optimize"]]
        for kind in _COSTS
    }
    taken = [Line(peer, points, colours.get(peer, 0)) for peer, points in latency.items()]
    spent = [
        Line(_COSTS[kind], points, index) for index, (kind, points) in enumerate(costs.items()) if points
    ]
    return [
        (f"Latency against {name}", lines(taken, name, "ms", f"milliseconds of each side by {name}")),
        (
            f"Seconds to optimize against {name}",
            lines(spent, name, "s", f"seconds to optimize, cold and warm, by {name}"),
        ),
    ]


def _environments(rows: Sequence[Row]) -> list[tuple[str, str, str, list[str]]]:
    """Where rows were measured: device, software, commit and day, and the cases."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        threads = f", {row['threads']} threads" if row.get("device") == "cpu" else ""
        driver = f", driver {row['driver']}" if row.get("driver") else ""
        device = f"{row.get('device_name', row.get('device', ''))}{threads}{driver}"
        software = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        found.setdefault((device, software, f"{row['commit']}, {row['date']}"), []).append(row["case"])
    return [(*key, cases) for key, cases in found.items()]
