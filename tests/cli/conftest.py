"""A folder of models to name, and two ways to run the command: in this process, and as a user would."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

# A shell starts what runs in its background with SIGINT ignored, and children inherit that.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from graphopt.cli import main; main()"
)
ZOO = """
import time
import torch


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(8, 96), torch.nn.Linear(96, 8), torch.nn.LayerNorm(8)

    def forward(self, x, scale=None):
        y = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return y if scale is None else y * scale


class Airy(torch.nn.Module):
    def forward(self, x):
        return torch.special.airy_ai(x)


def block():
    print("the factory speaks")
    torch.manual_seed(0)
    return Block().eval(), (torch.randn(2, 3, 8),)


def keywords():
    return Block().eval(), [torch.randn(2, 3, 8)], {"scale": torch.randn(8)}


def airy():
    return Airy().eval(), (torch.randn(3),)


def training():
    return Block(), (torch.randn(2, 3, 8),)


def bare():
    return Block().eval()


def tensor_args():
    return Block().eval(), torch.randn(2, 3, 8)


def number():
    return 3


def raises():
    raise ValueError("no such luck\\nand more")


def needs(size, depth=2):
    return Block().eval(), ()


def interrupts():
    raise KeyboardInterrupt


def sleeps():
    print("sleeping", flush=True)
    time.sleep(60)


instance = Block().eval()
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, which holds ``zoo.py``; what it imports is forgotten afterwards."""
    (tmp_path / "zoo.py").write_text(ZOO)
    (tmp_path / "unsound.py").write_text("x = 1\nimport zoo_of_nothing\n")
    (tmp_path / "garbled.py").write_text("x = (1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("zoo", "unsound", "garbled"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture
def run() -> Callable[..., Any]:
    """The command in this process; returns click's result."""
    from graphopt.cli import app

    return lambda *args: CliRunner().invoke(app, list(map(str, args)), prog_name="graphopt")


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """The command as a process of its own."""

    def start(*args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )

    return start
