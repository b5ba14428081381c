"""Models in narrower numbers under the gate: locked, checked by what they may lose, and configured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from graphopt.cli import _subject
from graphopt.gate import facts
from tests.gate.conftest import Project, told

LOCK = ("lock", "model:make", "--executors", "eager", "--seconds", "0.1", "--processes", "1", "-q")


def locked(project: Project, *args: str) -> dict[str, Any]:
    """The entry that ``graphopt lock`` writes."""
    done = project.run(*LOCK, "--max-loss", "0.2", *args)
    assert done.exit_code == 0, done.output
    (entry,) = json.loads(project.lock.read_text())["models"].values()
    return dict(entry)


def test_a_precision_is_locked_and_checked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = locked(project, "--precision", "bf16")
    assert entry["config"]["precision"] == "bf16"
    assert entry["facts"]["plan"]["chosen"] == "eager (bf16)"
    assert entry["facts"]["numerics"]["error"] > 1e-4
    code, findings = project.check()
    assert code == 0, findings
    assert told(findings, "error", "passed")
    monkeypatch.setattr(_subject, "Subject", lambda **given: replace(facts.Subject(**given), max_loss=1e-5))
    code, findings = project.check()
    assert code == 1
    assert "above the 1e-05 allowed" in told(findings, "error")["message"]


def test_pyproject_says_it_where_the_command_line_is_silent(project: Project) -> None:
    (project.folder / "pyproject.toml").write_text('[tool.graphopt]\nprecision = "bf16"\n')
    entry = locked(project)
    assert entry["config"]["precision"] is None
    assert entry["facts"]["plan"]["chosen"] == "eager (bf16)"
    assert project.check()[0] == 0
    assert locked(project, "--force", "--precision", "exact")["facts"]["plan"]["chosen"] == "eager"


def test_what_was_measured_to_run_is_what_checks_run(project: Project) -> None:
    """The exact model was faster when it was locked: no later check takes the narrow one untimed."""
    locked(project, "--precision", "exact")
    project.change(lambda entry: entry["config"].update(precision="bf16"))
    project.change(lambda entry: entry["runs"].update(precision="exact"))
    code, findings = project.check()
    assert code == 0, findings
    project.change(lambda entry: entry["runs"].update(precision=None))
    assert project.check()[0] == 1


def test_bad_precisions_are_told(project: Project) -> None:
    done = project.run(*LOCK, "--precision", "int3")
    assert done.exit_code == 2
    assert "precision='int3' is unknown" in done.output
    locked(project)
    for section in ("config", "runs"):
        project.change(lambda entry, section=section: entry[section].update(precision=8))
        done = project.run("check", "--no-time")
        assert done.exit_code == 2
        assert "does not read" in done.output


def test_nothing_may_be_lost_where_the_model_runs_in_its_own_numbers() -> None:
    config = _subject.Config("model:make")
    assert _subject._allowed(config, "exact") is None
    assert _subject._allowed(config, "int8") == 0.04
    assert _subject._allowed(replace(config, max_loss=0.5), "int8") == 0.5


CALIBRATED = """
import torch


def further():
    yield (torch.full((8, 64), 100.0),)


def make():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)
    return torch.nn.Sequential(*layers).eval(), (torch.randn(8, 64),)
"""


def test_ranges_are_those_of_the_calibration(project: Project) -> None:
    project.write(CALIBRATED)
    narrow = ("--force", "--precision", "int8-static", "--max-loss", "0.5")
    alone = locked(project, *narrow)
    entry = locked(project, *narrow, "--calibration", "model:further")
    errors = [found["facts"]["numerics"]["error"] for found in (alone, entry)]
    assert entry["facts"]["plan"]["chosen"] == "eager (int8-static)"
    assert errors[1] > 10 * errors[0]  # a step that reaches to 100 is a coarse one
    code, findings = project.check()
    assert code == 0, findings
    project.change(lambda entry: entry["runs"].update(precision="exact"))
    assert project.check()[0] == 1  # another plan than the lock's, and one that has no ranges


@pytest.mark.parametrize(
    ("body", "precision", "said"),
    [
        ("yield torch.ones(3)", "int8-static", "calibration input 0 is a Tensor"),
        ("return 1 / 0", "int8-static", "model:further gives no inputs: ZeroDivisionError"),
        ("yield (torch.ones(2, 3, 8),)", "bf16", "precision='bf16' has no ranges to calibrate"),
    ],
)
def test_bad_calibrations_are_told(project: Project, body: str, precision: str, said: str) -> None:
    project.edit("def make():", f"def further():\n    {body}\n\n\ndef make():")
    done = project.run(*LOCK, "--precision", precision, "--calibration", "model:further")
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not project.lock.exists()
