"""The page in a real browser, as a user drives it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphopt.observe.report import Report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium to open the page in", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive the browser with")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, report: Report, tmp_path: Path) -> Iterator[Any]:
    """The made report's page; whatever the console complains of fails the test, and so does a request."""
    report.to_html(tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and said.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    yield page
    assert said == []
    page.close()


def names(page: Any, graph: str, mark: str) -> list[str]:
    found = page.locator(f"figure[data-graph={graph}] .node.{mark} title").all_text_contents()
    return [text.split(": ")[0] for text in found]


def column(page: Any, table: str, index: int) -> list[str]:
    cells: list[str] = page.locator(
        f"#{table} tbody tr:not([hidden]) td:nth-child({index})"
    ).all_text_contents()
    return cells


def test_a_click_shows_where_a_node_comes_from(page: Any, hostile: str) -> None:
    assert page.title().startswith("Net</script>")  # the hostile name has run nothing
    page.locator("figure[data-graph=after] .node.fused").click()
    assert names(page, "before", "related") == ["linear", "gelu"]
    details = page.locator("#details").inner_text()
    for said in (
        hostile,
        "graphopt.linear_activation",
        "float32 [2, 8]",
        "/m/model.py:4",
        "body",
        "0.300 ms",
        "linear",
    ):
        assert said in details
    page.locator("figure[data-graph=before] .node.product").click()
    assert [name[:10] for name in names(page, "after", "related")] == [hostile[:10]]
    page.locator("figure[data-graph=before] svg").click(position={"x": 5, "y": 5})
    assert names(page, "after", "related") == []


def test_a_click_on_a_header_sorts_by_value(page: Any, hostile: str) -> None:
    header = page.locator("#time-table th button", has_text="ms")
    header.click()
    assert column(page, "time-table", 4) == ["0.300", "0.100", "0.0500"]
    header.click()
    assert column(page, "time-table", 4) == ["0.0500", "0.100", "0.300"]
    assert page.locator("#time-table th[aria-sort=ascending]").inner_text().startswith("ms")
    page.locator("#time-table th button", has_text="node").click()
    assert column(page, "time-table", 1) == sorted(["add", hostile, "node_Cast_1"], key=str.lower)


def test_text_filters_rows(page: Any) -> None:
    page.get_by_label("filter the nodes").fill("cast")
    assert column(page, "time-table", 1) == ["node_Cast_1"]
    page.get_by_label("filter the nodes").fill("")
    assert len(column(page, "time-table", 1)) == 3
    page.get_by_label("filter the remarks").fill("fuse_dear")
    assert len(column(page, "remark-table", 1)) == 2


def test_a_name_in_a_table_leads_to_the_drawing(page: Any) -> None:
    page.locator("#remark-table button.link", has_text="gelu").first.click()
    assert names(page, "before", "picked") == ["gelu"]
    assert page.locator("#time-table button.link", has_text="node_Cast_1").is_disabled()


def test_the_keyboard_walks_zooms_and_lets_go(page: Any) -> None:
    page.locator("figure[data-graph=before] svg").focus()
    walked = []
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
        walked += names(page, "before", "picked")
    assert walked == ["x", "linear", "gelu", "linear", "gelu"]
    page.keyboard.press("Escape")
    assert names(page, "before", "picked") == []
    scene = page.locator("figure[data-graph=before] .scene")
    start = scene.get_attribute("transform")
    page.keyboard.press("+")
    assert scene.get_attribute("transform") != start
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "find"


def test_wheel_and_drag_move_the_drawing(page: Any) -> None:
    scene = page.locator("figure[data-graph=after] .scene")
    box = page.locator("figure[data-graph=after] svg").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 30
    page.mouse.move(x, y)
    before = page.locator("figure[data-graph=after] .node.fused").bounding_box()
    page.mouse.wheel(0, -400)
    page.wait_for_function("k => views.after.k > k", arg=1.21)
    after = page.locator("figure[data-graph=after] .node.fused").bounding_box()
    assert after["width"] > 1.5 * before["width"]
    start = scene.get_attribute("transform")
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=4)
    page.mouse.up()
    moved = page.locator("figure[data-graph=after] .node.fused").bounding_box()
    assert scene.get_attribute("transform") != start
    assert (round(moved["x"] - after["x"]), round(moved["y"] - after["y"])) == (60, 40)
    assert names(page, "after", "picked") == []


def test_finding_a_node_brings_it_into_sight(page: Any) -> None:
    page.get_by_label("find a node in this graph").first.fill("args[0]")
    assert names(page, "before", "picked") == ["x"]
    page.get_by_label("find a node in this graph").first.fill("no such node")
    assert names(page, "before", "picked") == []


def test_it_prints(page: Any) -> None:
    page.emulate_media(media="print")
    assert not page.locator("#details").is_visible()
    assert page.pdf()[:5] == b"%PDF-"
