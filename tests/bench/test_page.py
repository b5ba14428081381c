"""The page of a benchmark: escaped, complete, and right in a browser."""

from __future__ import annotations

import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from graphopt.bench.page import render, write_page
from graphopt.bench.plot import Bar, Line, bars, lines, ticks
from graphopt.bench.setting import Case
from graphopt.bench.side import Side
from tests.bench._rows import failing, row

HOSTILE = "zoo:<script>alert(1)</script>&"
ROWS = [
    *(
        row(
            Case(HOSTILE, {"batch": batch, "seq": 16}),
            float(batch),
            {"eager": 2.0 * batch, "inductor (max-autotune)": 0.5 * batch},
            broken=(Side("openvino", "", wrong="error <b>1e-02</b>"),),
            cold=True,
        )
        for batch in (1, 8, 32)
    ),
    failing(Case("zoo:other"), "no <i>luck</i>"),
]


def test_names_and_errors_are_escaped() -> None:
    page = render(ROWS)
    for text in ("<script>alert", "<b>1e-02", "<i>luck"):
        assert text not in page
    assert "zoo:&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page


def test_every_part_is_there_and_nothing_is_fetched() -> None:
    page = render(ROWS)
    for words in ("geometric mean", "cold L2", "Not counted", "Missing peers", "pip install torch-tensorrt"):
        assert words in page
    assert "Latency against batch" in page
    assert "Latency against seq" not in page  # one length only: there is nothing to draw
    assert page.count("graphopt bench ") >= len(ROWS) - 1
    assert not re.search(r'(src|href)="(?!#|data:)', page)


def test_a_page_of_failures_alone() -> None:
    page = render(ROWS[-1:])
    assert "Nothing could be compared" in page
    assert "not measured: no &lt;i&gt;luck" in page


def test_bars_reach_as_far_as_their_ratios() -> None:
    drawn = bars(
        [("case", [Bar("a", 2.0, 1.9, 2.1, 1, 0.02, "two"), Bar("b", 0.5, 0.4, 0.6, 2, 0.02, "half")])], "x"
    )
    found = [
        tuple(map(float, pair))
        for pair in re.findall(r'class="bar" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    ]
    (right, wide), (left, narrow) = found
    assert left + narrow == pytest.approx(right, abs=0.2)  # both end at 1
    assert wide == pytest.approx(narrow, abs=0.2)  # 2 and 1/2 are equally far from it
    assert "<title>two</title>" in drawn


def test_lines_are_straight_where_growth_is_a_power() -> None:
    drawn = lines([Line("a", [(n, 3.0 * n**2) for n in (1, 2, 4, 8)], 0)], "batch", "ms", "x")
    points = [tuple(map(float, point)) for point in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3.5"', drawn)]
    slopes = {round((b[1] - a[1]) / (b[0] - a[0]), 1) for a, b in pairwise(points)}
    assert len(slopes) == 1
    assert all(f">{n}</text>" in drawn for n in (1, 2, 4, 8))


@pytest.mark.parametrize(
    ("low", "high"), [(0.8, 1.25), (0.01, 4000.0), (3.1, 3.4), (90.0, 110.0), (1e-9, 1e9)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert len(found) <= 9
    assert found == sorted(set(found))
    assert all(low <= tick <= high for tick in found)
    assert found or math.log10(high / low) < 0.05


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
def test_it_opens_in_a_browser_without_a_complaint(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive the browser with")
    write_page(tmp_path / "bench.html", ROWS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and said.append(request.url))
        page.goto((tmp_path / "bench.html").as_uri())
        assert said == []
        assert page.locator("svg.plot").count() == 2 + 2  # warm and cold speed, latency and cost by batch
        assert page.locator("svg.plot .bar").count() == 12
        assert page.locator("tr.slower .verdict").first.inner_text() == "slower"
        for index in range(page.locator("svg.plot").count()):  # no text runs out of its plot
            plot = page.locator("svg.plot").nth(index)
            box = plot.bounding_box()
            for text in plot.locator("text:not(.heading)").all():
                inner = text.bounding_box()
                assert inner["x"] >= box["x"] - 1
                assert inner["x"] + inner["width"] <= box["x"] + box["width"] + 1
        browser.close()
