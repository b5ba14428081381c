"""Rows as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.bench import summary
from graphopt.observe.summary import ms, size, times

Row = dict[str, Any]

_PLACES = {"at": "where", "try": "hint"}
_STYLES = {"faster": "green", "slower": "red", "level": ""}


def show(rows: Sequence[Row], console: Console) -> None:
    """Print every case, what they say together, and what was lost, left out or missing."""
    if summary.measured(rows):
        console.print(_cases(rows))
        console.print(_costs(rows))
        console.print(_together(rows))
    for title, lines in closing(rows):
        console.print(Text(title, style="bold"))
        for line in lines:
            console.print(Text(f"  {line}"))
    if not summary.losses(rows):
        console.print(Text("No case was lost."))


def closing(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """What must not be left unsaid: titles, each with its lines."""
    lost = [f"{loss.case}: {loss.reason}\n    {loss.command}" for loss in summary.losses(rows)]
    left_out = [f"{case}: {side}: {why}" for case, side, why in summary.excluded(rows)]
    absent = [
        f"{peer}: {why}" + (f"; {install}" if install else "")
        for peer, (why, install) in summary.missing(rows).items()
    ]
    unloaded = [f"{case}: {why}" for case, why in summary.unloaded(rows)]
    named = (
        ("Lost", lost),
        ("Not counted", left_out),
        ("Missing peers", absent),
        ("No load time", unloaded),
    )
    return [(title, lines) for title, lines in named if lines]


def told(row: Row) -> str:
    """A case as soon as it is measured: a line, or an error with its place and the way out."""
    if "failed" in row:
        places = [f"  {word}: {row['failed'][key]}" for word, key in _PLACES.items() if key in row["failed"]]
        return "\n".join([f"{row['case']}: not measured: {row['failed']['message']}", *places])
    own = row["sides"][0]
    if "ms" not in own:
        return f"{row['case']}: graphopt {'is wrong: ' + own['wrong'] if 'wrong' in own else own['failed']}"
    ratios = [
        f"{peer}{', exact,' if found.get('precision') == 'exact' else ''} {found['ratio']:.2f}×"
        f" ({found['verdict']})"
        for peer, found in row["ratio"].items()
    ]
    return f"{row['case']}: {ms(own['ms']['median'])} ms; " + ", ".join(ratios)


def _table(title: str, *columns: str, numbers: Sequence[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in numbers else "left", overflow="fold")
    return table


def _cases(rows: Sequence[Row]) -> Table:
    """Every side of every case; a peer's ratio stands beside the mode that counts."""
    columns = ("side", "median ms", "quartiles", "cold L2 ms", "to graphopt [95 %]", "verdict", "error")
    table = _table("Cases", *columns, numbers=(1, 2, 3, 6))
    for row in summary.measured(rows):
        head = [row["case"], f"noise {summary.floor(row)}" if summary.floor(row) else ""]
        if row["lengths"]:
            head.append(f"{100 * row['lengths']['fill']:.0f} % no padding")
        if row["interrupted"]:
            head.append(f"interrupted after {row['rounds_done']} rounds")
        table.add_row(Text("; ".join(filter(None, head)), style="bold"))
        for side in row["sides"]:
            table.add_row(*map(Text, _cells(row, side)), style=_style(row, side))
        table.add_section()
    return table


def _cells(row: Row, side: dict[str, Any]) -> list[str]:
    took, cold = side.get("ms"), side.get("cold_ms")
    spread = f"{ms(took['lower'])} – {ms(took['upper'])}" if took else ""
    found = row["ratio"].get(side["peer"]) if side["counts"] else None
    said = found["verdict"] if found else "wrong" if "wrong" in side else "failed" if "failed" in side else ""
    return [
        f"  {summary.label(side)}",
        ms(took["median"]) if took else "",
        spread,
        ms(cold["median"]) if cold else "",
        summary.speed(found) if found else "",
        said,
        summary.accuracy(side),
    ]


def _style(row: Row, side: dict[str, Any]) -> str:
    if "wrong" in side or "failed" in side:
        return "red" if side["peer"] == "graphopt" else "dim"
    found = row["ratio"].get(side["peer"]) if side["counts"] else None
    return _STYLES[found["verdict"]] if found else "" if side["peer"] == "graphopt" else "dim"


def _costs(rows: Sequence[Row]) -> Table:
    """What optimizing costs, and what is left on disk."""
    columns = ("case", "optimize s, cold", "warm", "peak memory", "weights", "artifact", "load s", "mJ")
    table = _table("Costs", *columns, numbers=range(1, 8))
    for row in summary.measured(rows):
        cost, joules = row["optimize"], row["sides"][0].get("joules")
        table.add_row(
            row["case"],
            f"{cost['cold_s']:.1f}",
            "-" if "warm_s" not in cost else f"{cost['warm_s']:.1f}",
            size(cost["peak_bytes"]),
            size(cost["weights_bytes"]),
            "-" if "artifact_bytes" not in cost else size(cost["artifact_bytes"]),
            "-" if "load_s" not in cost else f"{cost['load_s']:.2f}",
            "-" if joules is None else f"{1e3 * joules:.3g}",
        )
    return table


def _together(rows: Sequence[Row]) -> Table:
    columns = ("against", "cases", "geometric mean", "worst", "in", "faster", "level", "slower")
    table = _table("Together", *columns, numbers=(1, 2, 3, 5, 6, 7))
    for found in summary.against(rows):
        counts = [str(found.verdicts[name]) for name in ("faster", "level", "slower")]
        cells = [found.peer, str(found.cases), times(found.mean), times(found.worst), found.worst_case]
        table.add_row(*cells, *counts)
    return table
