"""The examples for build servers: they parse, have what the servers want, and their commands run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gate.conftest import Project, lock_text, locked, project

__all__ = ["lock_text", "locked", "project"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "examples" / "ci"


@pytest.fixture
def gated(locked: Project) -> Project:
    """A project whose check does not depend on how busy this machine is."""
    locked.change(lambda entry: entry["budgets"].update(max_latency_ratio=None, max_slowdown=None))
    return locked


def parsed(name: str) -> Any:
    return yaml.safe_load((CI / name).read_text())


def run(project: Project, command: str) -> None:
    first, *arguments = shlex.split(command)
    assert first == "graphopt"
    done = project.run(*arguments)
    assert done.exit_code == 0, done.output


def test_github(gated: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parsed("github.yml")
    assert set(found[True]) == {"pull_request", "push"}  # YAML reads `on` as true
    (job,) = found["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest"
    steps = {step.get("name", step.get("uses")): step for step in job["steps"]}
    assert all(("uses" in step) != ("run" in step) for step in steps.values())
    assert all("@v" in step["uses"] for step in steps.values() if "uses" in step)
    run(gated, steps["Hold the models to graphopt.lock"]["run"])
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    subprocess.run(["bash", "-ec", steps["Show the summary"]["run"]], cwd=gated.folder, check=True)
    assert "## graphopt check" in (gated.folder / "summary.md").read_text()
    assert steps["Keep the results of checks that passed"]["with"]["path"] == ".graphopt/check"
    for step in steps.values():
        files = step.get("with", {})
        for file in (files.get("sarif_file") or (files["path"] if "name" in files else "")).split():
            assert (gated.folder / file).is_file(), file
    assert list((gated.folder / ".graphopt" / "check").glob("*.json"))


def test_gitlab(gated: Project) -> None:
    (job,) = parsed("gitlab.yml").values()
    for command in job["script"]:
        run(gated, command)
    reports = job["artifacts"]["reports"]
    assert set(reports) == {"codequality", "junit"}
    for file in (*reports.values(), *job["artifacts"]["paths"]):
        assert (gated.folder / file).is_file()
    assert job["allow_failure"] == {"exit_codes": [3]}


def test_pre_commit(gated: Project) -> None:
    (repository,) = parsed("pre-commit.yaml")["repos"]
    (hook,) = repository["hooks"]
    assert {"id", "name", "entry", "language"} <= set(hook)
    assert (repository["repo"], hook["language"]) == ("local", "system")
    run(gated, hook["entry"])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_makefile(gated: Project) -> None:
    """As a user would run it: a process of its own, and the command from the path."""
    command = gated.folder / "bin" / "graphopt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graphopt "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    done = subprocess.run(
        ["make", "-f", str(CI / "Makefile"), "gate"],
        cwd=gated.folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (gated.folder / "graphopt.json").is_file()
