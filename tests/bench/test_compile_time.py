"""The suite that times ``optimize`` itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import compile_time


def test_a_row_says_where_the_time_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_time, "CASES", {"llama-2": 2, "llama-99": 99})
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "time", "--only", "llama-2", "--threads", "1"])
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main()
    (row,) = (json.loads(line) for line in (tmp_path / "time.jsonl").read_text().splitlines())
    stages = {stage: seconds for stage, seconds in row["seconds"].items() if stage != "all"}
    assert {"capture", "rewrite", "verify", "lower"} <= set(stages)
    assert 0 < sum(stages.values()) <= row["seconds"]["all"] + 0.01
    assert row["layers"] == 2
    assert row["nodes"] > 2 * row["nodes_after"] > 0
    assert row["threads"] == 1
    assert {"device_name", "commit", "versions", "command", "cpu_seconds"} <= set(row)
    assert "llama-2" in capsys.readouterr().out


def test_a_dry_run_records_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_time, "CASES", {"llama-1": 1})
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "time", "--dry", "--threads", "1"])
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main()
    assert not list(tmp_path.iterdir())
