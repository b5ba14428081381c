"""The report as tables in a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.observe import summary
from graphopt.observe.summary import error, ms, short_source, times

if TYPE_CHECKING:
    from graphopt.observe.report import Report

_WIDTH = 120  # where there is no terminal to ask
_MISSES, _NODES = 8, 10


def text(report: Report) -> str:
    """The tables as plain text."""
    sink = io.StringIO()
    show(report, Console(file=sink, width=_WIDTH, color_system=None))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()).rstrip()


def show(report: Report, console: Console | None) -> None:
    """Print the tables.

    Args:
        report: the report.
        console: where; None for stdout.
    """
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH)
    chosen = report.chosen
    took = f", {ms(chosen.ms)} ms a call" if chosen.ms is not None else ""
    console.print(Text.assemble((report.model, "bold"), f" runs on {chosen.name}{took}"))
    console.print(Text(summary.claim(report)[1]))
    console.print(Text(report.verdict), end="\n\n")
    for table in (_candidates(report), _ops(report), _passes(report), _plan(report), _memory(report)):
        console.print(table)
    if missed := summary.misses(report.remarks):
        console.print(_misses(missed))
    if report.node_times:
        console.print(_nodes(report))


def _candidates(report: Report) -> Table:
    table = _table("Candidates", "candidate", "ms", "±", "speed", "error", "", numbers=(1, 2, 3, 4))
    for row in report.candidates:
        ratio = times(summary.speed_ratio(row, report.baseline))
        outcome = "chosen" if row.chosen else row.reason
        cells = [row.name, ms(row.ms), ms(row.spread_ms), ratio, error(row.error), outcome]
        table.add_row(*map(Text, cells), style="bold green" if row.chosen else "dim" if row.reason else "")
    return table


def _ops(report: Report) -> Table:
    before, after = sum(report.ops_before.values()), sum(report.ops_after.values())
    title = f"Ops: {before} before, {after} after"
    table = _table(title, "op", "before", "after", "difference", numbers=(1, 2, 3))
    changed = summary.op_changes(report.ops_before, report.ops_after)
    for row in changed:
        if row.difference:
            table.add_row(Text(row.op), str(row.before), str(row.after), f"{row.difference:+d}")
    if same := [f"{row.op} {row.after}" for row in changed if not row.difference]:
        table.caption = Text("as many as before: " + ", ".join(same))
    return table


def _passes(report: Report) -> Table:
    headers = ("pass", "kind", "kept", "reverted", "shared verdicts", "worst error before", "after")
    table = _table("Rewrites, each checked against float64", *headers, numbers=(2, 3, 4, 5, 6))
    for row in summary.pass_summaries(report.rewrites):
        counts = (str(row.kept), str(row.reverted or "-"), str(row.shared or "-"))
        errors = (error(row.error_before), error(row.error_after))
        table.add_row(Text(row.name), row.kind, *counts, *errors, style="yellow" if row.reverted else "")
    return table


def _plan(report: Report) -> Table:
    table = _table("Plan", "step", "executor", "device", "nodes", "most frequent ops", numbers=(3,))
    for row in report.plan:
        most = ", ".join(f"{op} {count}" for op, count in list(row["ops"].items())[:4])
        table.add_row(*map(Text, (row["step"], row["executor"], row["device"], str(row["nodes"]), most)))
    graphs = report.cuda_graphs
    if graphs is not None:
        buckets = sorted({bucket for row in report.plan for bucket in row.get("token_buckets", ())})
        table.caption = (
            f"{graphs['coverage']:.0%} of the nodes in {graphs['count']} CUDA graphs,"
            f" whose memory is {summary.size(graphs['bytes'])}"
            + (f", for up to {', '.join(map(str, buckets))} tokens" if buckets else "")
            + (f"; branches on {graphs['streams']} streams" if graphs["streams"] > 1 else "")
        )
    return table


def _memory(report: Report) -> Table:
    table = _table("Memory", "", "before", "after", numbers=(1, 2))
    for row in summary.memory_rows(report.memory):
        table.add_row(*row)
    table.caption = f"The process held {summary.size(report.memory['peak_rss'])} at most."
    return table


def _misses(missed: Sequence[summary.Miss]) -> Table:
    title = _first("Missed, the most expensive first", _MISSES, missed)
    table = _table(title, "pass", "reason", "source", "times", "est. ms", numbers=(3, 4))
    for row in missed[:_MISSES]:
        remark = row.remark
        cells = (remark.pass_name, remark.reason, short_source(remark.source), str(row.count), ms(row.ms))
        table.add_row(*map(Text, cells))
    return table


def _nodes(report: Report) -> Table:
    title = _first("Slowest nodes", _NODES, report.node_times)
    table = _table(title, "node", "kernel", "executor", "ms", "source", "module", numbers=(3,))
    for row in report.node_times[:_NODES]:
        cells = (row.node, row.op, row.executor, ms(row.ms), short_source(row.source), row.module)
        table.add_row(*map(Text, cells))
    return table


def _first(title: str, shown: int, rows: Sequence[object]) -> str:
    return f"{title} ({shown} of {len(rows)})" if len(rows) > shown else title


def _table(title: str, *headers: str, numbers: Iterable[int]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE
    )
    right = set(numbers)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", overflow="fold")
    return table
