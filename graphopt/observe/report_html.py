"""The report as one page: HTML, style, script and both drawings in a single file."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from graphopt.observe import summary
from graphopt.observe.drawing import KINDS, draw, kind_of

if TYPE_CHECKING:
    from graphopt.observe.report import GraphNode, Report

_REMARKS = ("missed", "analysis", "passed")  # the order on the page


def render(report: Report) -> str:
    """The page as text. Whatever comes from the user's model is escaped."""
    before, after = report.graph_before, report.graph_after
    return _template().render(
        report=report,
        claim=summary.claim(report),
        ops=summary.op_changes(report.ops_before, report.ops_after),
        passes=summary.pass_summaries(report.rewrites),
        reverted=[rewrite for rewrite in report.rewrites if not rewrite.kept],
        drawings=[
            ("before", "Before: as captured", draw(before, "the graph before")),
            ("after", "After: as it runs", draw(after, "the graph after")),
        ],
        remarks=sorted(report.remarks, key=lambda row: (_REMARKS.index(row.kind), -row.ms)),
        kinds=KINDS,
        node_ms=sum(row.ms for row in report.node_times),
        data=_data(report),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    helpers = (
        summary.ms,
        summary.error,
        summary.size,
        summary.times,
        summary.short_source,
        summary.memory_rows,
    )
    environment.filters |= {helper.__name__: helper for helper in helpers}
    environment.globals["speed_ratio"] = summary.speed_ratio
    return environment.get_template("report.html.jinja")


def _data(report: Report) -> dict[str, Any]:
    """What the script needs: the nodes of both graphs, and for each those of the other that belong to it."""
    took: dict[str, float] = defaultdict(float)
    for row in report.node_times:
        took[row.node] += row.ms
    before, after = report.graph_before, report.graph_after
    forward, backward = relations(before, after)
    return {
        "before": [_row(node, forward[i], None) for i, node in enumerate(before)],
        "after": [_row(node, backward[i], took.get(node.name)) for i, node in enumerate(after)],
    }


def _row(node: GraphNode, related: Sequence[int], took: float | None) -> dict[str, Any]:
    return {
        "name": node.name,
        "label": node.label,
        "op": node.op,
        "kind": KINDS[kind_of(node.op)],
        "shape": node.shape,
        "source": node.source,
        "module": node.module,
        "origins": list(node.origins),
        "ms": took,
        "related": list(related),
    }


def relations(
    before: Sequence[GraphNode], after: Sequence[GraphNode]
) -> tuple[list[list[int]], list[list[int]]]:
    """Which nodes of the other graph a node became, and which it came from, by index.

    Inputs and outputs have no origins and belong to those of their name.
    """
    captured = {node.name: index for index, node in enumerate(before)}
    forward: list[list[int]] = [[] for _ in before]
    backward: list[list[int]] = []
    for index, node in enumerate(after):
        sources = [captured[name] for name in node.origins or (node.name,) if name in captured]
        backward.append(sources)
        for source in sources:
            forward[source].append(index)
    return forward, backward
