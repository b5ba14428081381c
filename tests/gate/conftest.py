"""A project with a model in it and a lock beside it; tests plant a defect in the model and run the check."""

from __future__ import annotations

import importlib
import json
import linecache
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

MODEL = """
import torch
import torch.nn.functional as F


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 96), torch.nn.Linear(96, 8)
        self.memory = torch.nn.Parameter(torch.randn(1, 2, 5, 4))

    def attend(self, x):
        q = self.q(x).reshape(2, 3, 2, 4).transpose(1, 2)
        k = self.memory.expand(2, 2, 5, 4)
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(2, 3, 8)

    def forward(self, x):
        x = x + self.attend(x)
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def make():
    torch.manual_seed(0)
    model = Model().eval()
    return model, (torch.randn(2, 3, 8),)


def accuracy(model):
    return float(model(torch.ones(2, 3, 8)).mean())
"""


@dataclass
class Project:
    """A folder that is the current one, with ``model.py`` and perhaps a lock.

    Args:
        folder: the folder.
    """

    folder: Path

    @property
    def lock(self) -> Path:
        return self.folder / "graphopt.lock"

    def edit(self, old: str = "", new: str = "") -> None:
        """Write model.py anew, a text in it replaced."""
        assert old in MODEL
        self.write(MODEL.replace(old, new) if old else MODEL)

    def write(self, text: str) -> None:
        (self.folder / "model.py").write_text(text)
        sys.modules.pop("model", None)
        importlib.invalidate_caches()
        linecache.checkcache()

    def run(self, *args: Any) -> Any:
        """The command in this process; returns click's result."""
        from graphopt.cli import app

        sys.modules.pop("model", None)
        return CliRunner().invoke(app, list(map(str, args)), prog_name="graphopt")

    def check(self, *args: Any) -> tuple[int, list[dict[str, Any]]]:
        """Exit code and findings of a check that times nothing."""
        done = self.run("check", "--no-time", "--no-cache", "--json", *args)
        assert done.exit_code in (0, 1, 3), done.output
        return done.exit_code, [
            row for found in json.loads(done.stdout)["results"] for row in found["findings"]
        ]

    def change(self, mend: Callable[[dict[str, Any]], object]) -> None:
        """Edit the lock's only entry in place."""
        found = json.loads(self.lock.read_text())
        (entry,) = found["models"].values()
        mend(entry)
        self.lock.write_text(json.dumps(found))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A project without a lock."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = Project(tmp_path)
    made.edit()
    yield made
    sys.modules.pop("model", None)
    importlib.invalidate_caches()


@pytest.fixture(scope="session")
def lock_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The lock of ``model:make``, made once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("locked")
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "dont_write_bytecode", True)
        made = Project(folder)
        made.edit()
        patch.setattr(
            "graphopt.cli._subject._as_fast", lambda *_: True
        )  # no test depends on this machine's load
        done = made.run("lock", "model:make", "--seconds", "0.1", "--processes", "1", "-q")
        assert done.exit_code == 0, done.output
        sys.modules.pop("model", None)
        return made.lock.read_text()


@pytest.fixture
def locked(project: Project, lock_text: str) -> Project:
    """A project with a lock that is true of it."""
    project.lock.write_text(lock_text)
    return project


def told(findings: list[dict[str, Any]], rule: str, status: str = "failed") -> dict[str, Any]:
    """The only finding, or the first, of a rule and a status."""
    found = [row for row in findings if row["rule"] == rule and row["status"] == status]
    assert found, [(row["rule"], row["status"], row["message"]) for row in findings]
    return found[0]


def line_of(project: Project, text: str) -> str:
    """``model.py:12``: where a text stands."""
    lines = (project.folder / "model.py").read_text().splitlines()
    return f"model.py:{next(i for i, line in enumerate(lines, 1) if text in line)}"


@pytest.fixture(scope="session")
def regressed(tmp_path_factory: pytest.TempPathFactory, lock_text: str) -> Path:
    """Saved results of a timed check whose model lost a fusion, made once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("regressed")
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "dont_write_bytecode", True)
        made = Project(folder)
        made.lock.write_text(lock_text)
        made.edit("k = self.memory.expand(2, 2, 5, 4)", "k = self.memory")
        done = made.run("check", "--no-cache", "--seconds", "0.1", "--save", "results.json", "-q")
        assert done.exit_code == 1, done.output
        sys.modules.pop("model", None)
        return folder / "results.json"
