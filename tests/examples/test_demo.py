"""The demo, as ``make demo`` runs it, but in this process, and without the minute that Inductor compiles."""

import math
import runpy
from pathlib import Path

import pytest

from graphopt.runtime import candidates


def test_demo_agrees_with_the_original_and_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates, "_WORTH_COMPILING_MS", math.inf)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo"])
    runpy.run_module("examples.demo", run_name="__main__")
    printed = capsys.readouterr().out
    assert "neighbours" in printed
    assert "similarities differ by at most" in printed
    worst = float(printed.split("similarities differ by at most")[1].split()[0])
    assert worst < 1e-5
    page = (tmp_path / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "graphopt.attention" in page
