"""The suite that measures sessions, at sizes that take no time."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import serving


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(serving, "_STORM", 400)
    monkeypatch.setattr(serving, "_STORM_THREADS", 4)
    monkeypatch.setattr(serving, "_ROUNDS", 1)
    monkeypatch.setattr(command, "RESULTS", tmp_path)

    def run(only: str) -> list[dict[str, Any]]:
        arguments = ["bench", "serve", "--only", only, "--threads", "1"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match="0"):
            command.main()
        return [json.loads(line) for line in (tmp_path / "serve.jsonl").read_text().splitlines()]

    return run


def test_rows_of_the_storm_and_of_the_scheduler(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measured("100,000 requests")
    storm, steps = measured("scheduler")
    assert sum(storm["ends"].values()) == 400
    assert set(storm["ends"]) <= {"answered", "cancelled", "expired", "failed"}
    assert len(storm["resident_mib"]) == 10
    assert steps["overhead_us_a_step"]["median"] == pytest.approx(0, abs=1000)
    assert {"device_name", "commit", "versions", "command", "threads"} <= set(storm)
    assert "µs a step" in capsys.readouterr().out


def test_a_row_of_clients(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.models import encoder

    monkeypatch.setattr(serving, "minilm", lambda batch, seq: encoder(1, 64, batch, seq))
    monkeypatch.setattr(serving, "_REQUESTS", 16)
    monkeypatch.setattr(serving, "CASES", {"tiny": partial(serving.clients, (2, 6), effort="fast")})
    (row,) = measured("tiny")
    assert row["clients"] == 64
    assert row["remarks"] == []
    assert sum(int(rows) * count for rows, count in row["batch_rows"].items()) >= 16
    assert set(row["requests_per_s"]) == {"one", "eager", "session"}
    assert row["ratio_to_eager"]["low"] <= row["ratio_to_eager"]["high"]
    assert row["bound_ms"] == pytest.approx(5 + 3 * row["batch_ms"]["median"], abs=0.1)
