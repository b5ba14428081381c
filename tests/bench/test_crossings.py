"""The suite that cuts an encoder: every cut gives the same numbers, and nothing that crosses is copied."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import crossings
from graphopt.runtime import scheduler

SMALL = (2, 64, 1, 8)


def test_two_crossings_copy_nothing() -> None:
    plans, inputs = crossings.cuts(SMALL)
    executors = {name: [step.executor for step in plan.steps] for name, plan in plans.items()}
    assert executors == {
        "whole": ["ort"],
        "three on ort": ["ort"] * 3,
        "ort, eager, ort": ["ort", "eager", "ort"],
    }
    for plan in plans.values():
        with crossings.CopyCounter() as counter:
            scheduler.run(plan, inputs)
        assert counter.count == counter.bytes == 0


def test_a_copy_is_counted() -> None:
    with crossings.CopyCounter() as counter:
        torch.ones(4, 4).t().contiguous()
        torch.ones(2).to(torch.float64)
    assert (counter.count, counter.bytes) == (2, 64 + 16)


def test_a_row_says_what_the_cuts_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crossings, "CASES", {"small": SMALL})
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "crossings", "--threads", "1"])
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main()
    (row,) = (json.loads(line) for line in (tmp_path / "crossings.jsonl").read_text().splitlines())
    assert set(row["ms"]) == {"whole", "three on ort", "ort, eager, ort", "again"}
    assert set(row["times_the_whole"]) == set(row["ms"]) - {"whole"}
    assert set(row["copies"].values()) == {0}
    assert {"device_name", "commit", "versions", "command"} <= set(row)
    assert "small" in capsys.readouterr().out
