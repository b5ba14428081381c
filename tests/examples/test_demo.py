"""The demo, as ``make demo`` runs it, but in this process, with few rounds and without Inductor's minute."""

import math
from pathlib import Path

import pytest

from examples import demo
from graphopt.runtime import ways


def test_demo_agrees_with_the_original_and_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ways, "_WORTH_COMPILING_MS", math.inf)
    monkeypatch.setattr(demo, "ROUNDS", 3)
    monkeypatch.chdir(tmp_path)
    demo.main()
    printed = capsys.readouterr().out
    assert "neighbours" in printed
    assert "similarities differ by at most" in printed
    worst = float(printed.split("similarities differ by at most")[1].split()[0])
    assert worst < 1e-5
    page = (tmp_path / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "graphopt.attention" in page
