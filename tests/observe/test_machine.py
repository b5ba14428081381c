"""Where a row was measured."""

from pathlib import Path

import pytest

from graphopt.observe.machine import commit


def test_a_tree_without_its_history_is_told_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GRAPHOPT_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("GRAPHOPT_COMMIT", "0123abc")
    assert commit(tmp_path) == "0123abc"
