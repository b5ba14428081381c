"""The pytest plugin, in runs of its own: it gates, and costs nothing where nobody asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.gate.conftest import Project

ROOT = Path(__file__).resolve().parents[2]

GATES = """
import pytest


def test_all_of_the_lock(graphopt):
    (result,) = graphopt.check(time=False)
    assert result.verdict == "pass"


@pytest.mark.graphopt("model:*", max_size=1)
def test_a_regression_fails(graphopt):
    graphopt.check(time=False)


@pytest.mark.graphopt("model:make", seconds=0.01, max_latency_ratio=1.0, max_slowdown=None)
def test_what_cannot_be_told_is_skipped(graphopt, monkeypatch):
    from graphopt.gate import latency
    from graphopt.gate.latency import Interval

    monkeypatch.setattr(Interval, "tell", lambda interval, limit: "unknown")
    graphopt.check()


@pytest.mark.graphopt("nothing:*")
def test_a_pattern_that_matches_nothing_fails(graphopt):
    graphopt.check(time=False)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "pytest_graphopt",
        "-p",
        "no:cacheprovider",
        "--strict-markers",
    ]
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_fixture_checks_models_of_the_lock(locked: Project) -> None:
    (locked.folder / "test_gate.py").write_text(GATES)
    done = run(locked.folder, "-v", "-rs")
    said = done.stdout + done.stderr
    assert "test_all_of_the_lock PASSED" in said
    assert "test_a_regression_fails FAILED" in said
    assert "1 B is allowed" in said
    assert "test_what_cannot_be_told_is_skipped SKIPPED" in said
    assert "inconclusive: model:make: inconclusive" in said
    assert "test_a_pattern_that_matches_nothing_fails FAILED" in said
    assert "'nothing:*' matches no model of graphopt.lock" in said
    assert done.returncode == 1


def test_a_run_that_does_not_use_it_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        "import sys\n\n"
        "def test_plain():\n"
        "    assert 'pytest_graphopt' in sys.modules\n"
        "    assert not {'torch', 'graphopt', 'numpy', 'rich'} & set(sys.modules)\n"
    )
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_marker_is_documented(tmp_path: Path) -> None:
    assert "graphopt(*specs, **budgets)" in run(tmp_path, "--markers").stdout
