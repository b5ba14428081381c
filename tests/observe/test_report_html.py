from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graphopt.observe.drawing import KINDS, kind_of
from graphopt.observe.report import GraphNode, Report
from graphopt.observe.report_html import relations, render

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Tags with their attributes, the text of tables' cells, the drawings' nodes, and scripts as they are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[str, list[list[str]]] = {}
        self.drawn: dict[str, dict[int, str]] = {}
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self._table = self._figure = self._script = ""
        self._node = -1
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = found.get("id") or "plain"
            self.cells[self._table] = []
        elif tag == "tr":
            self.cells[self._table].append([])
        elif tag in ("td", "th"):
            self.cells[self._table][-1].append("")
        elif tag == "figure":
            self._figure = found["data-graph"] or ""
            self.drawn[self._figure] = {}
        elif "data-node" in found:
            self._node = int(found["data-node"] or -1)
            self.drawn[self._figure][self._node] = ""
        elif tag == "script":
            self._script = found.get("id") or "code"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "figure":
            self._node = -1

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open[-1:] == ["script"]:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._open[-1:] == ["title"] and self._node >= 0:
            self.drawn[self._figure][self._node] += data
        elif {"td", "th"} & set(self._open):
            self.cells[self._table][-1][-1] += data


@pytest.mark.parametrize("which", ["report", "real"])
def test_both_graphs_hold_every_node_with_what_hovering_says(
    which: str, request: pytest.FixtureRequest
) -> None:
    report: Report = request.getfixturevalue(which)
    page = Page(render(report))
    for key, nodes in (("before", report.graph_before), ("after", report.graph_after)):
        assert sorted(page.drawn[key]) == list(range(len(nodes)))
        for index, node in enumerate(nodes):
            said = page.drawn[key][index]
            assert node.name in said
            assert node.op in said
            assert node.shape in said
            assert node.module in said
    paths = [attrs for tag, attrs in page.tags if tag == "path"]
    edges = sum(len(set(node.inputs)) for node in (*report.graph_before, *report.graph_after))
    assert len(paths) == edges > 0


def test_the_tables_hold_the_report(report: Report, hostile: str) -> None:
    page = Page(render(report))
    assert page.cells["op-table"][1:] == [
        ["aten.gelu", "1", "0", "-1"],
        ["aten.linear", "1", "0", "-1"],
        ["graphopt.linear_activation", "0", "1", "+1"],
        ["aten.add", "1", "1", "·"],
    ]
    assert page.cells["pass-table"][1] == [
        "fuse_linear_activation",
        "fuse",
        "2",
        "·",
        "1",
        "1.5e-07",
        "2.5e-07",
    ]
    assert page.cells["candidate-table"][1] == ["ort", "0.500", "0.0100", "3.00x", "2.2e-07", "chosen"]
    assert page.cells["candidate-table"][2][5] == f"it fails to run {hostile}"
    assert [row[0] for row in page.cells["time-table"][1:]] == [hostile, "add", "node_Cast_1"]
    assert [row[:2] for row in page.cells["remark-table"][1:]] == [
        ["missed", "fuse_dear"],
        ["missed", "fuse_dear"],
        ["missed", "fuse_cheap"],
        ["analysis", "partition"],
        ["passed", "fuse_linear_activation"],
    ]
    for said in (
        "3.00x the speed of eager PyTorch",
        "2 of 3 rewrites kept",
        "2.13.0",
        "1.5 KiB",
        "it differs",
    ):
        assert said in page.text


def test_hostile_names_stay_text(report: Report, hostile: str) -> None:
    page = Page(render(report))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert set(page.scripts) == {"data", "code"}
    data = json.loads(page.scripts["data"])
    assert data["after"][1]["name"] == hostile
    assert data["before"][2]["module"] == hostile
    assert "owned" not in page.scripts["code"]
    assert hostile in page.text
    assert "49" not in [cell for rows in page.cells.values() for row in rows for cell in row]


def test_the_page_needs_nothing_else(real: Report, tmp_path: Path) -> None:
    real.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not [attrs for _, attrs in page.tags if {"src", "srcset"} & attrs.keys()]
    links = [attrs["href"] or "" for _, attrs in page.tags if "href" in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.findall(r"url\(|@import|fetch\(|https?://", text)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert (policy or "").startswith("default-src 'none'")


def test_a_fused_node_belongs_to_all_that_it_was_made_from(report: Report) -> None:
    forward, backward = relations(report.graph_before, report.graph_after)
    assert backward == [[0], [1, 2], [3], [4]]
    assert forward == [[0], [1], [1], [2], [3]]


def test_a_node_that_was_folded_away_belongs_to_none() -> None:
    gone = GraphNode("arange", "aten.arange", (), "", "", "", ("arange",))
    new = GraphNode("new", "aten.add", (), "", "", "", ("elsewhere",))
    assert relations([gone], [new]) == ([[]], [[]])


def test_ops_have_the_kinds_of_the_legend() -> None:
    kinds = {
        "graphopt.attention": "fused",
        "aten.linear": "product",
        "aten.gelu": "math",
        "aten.transpose": "shape",
        "getitem": "shape",
        "aten.embedding": "lookup",
        "input": "end",
    }
    assert {op: kind_of(op) for op in kinds} == kinds
    assert set(kinds.values()) == set(KINDS)


def test_a_report_without_times_graphs_or_rewrites_is_a_page(report: Report) -> None:
    report.rewrites, report.node_times, report.remarks = [], [], []
    report.graph_before = report.graph_after = ()
    report.candidates = [type(report.chosen)("eager", None, None, 0.0, chosen=True)]
    page = Page(render(report))
    assert page.drawn == {"before": {}, "after": {}}
    assert "nothing rewritten" in page.text
