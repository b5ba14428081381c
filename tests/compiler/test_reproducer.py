"""The script of a reverted rewrite runs on its own and comes to the same verdict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.manager import REPRODUCERS
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.pattern import Call, Match, Var
from tests._models import randn
from tests.compiler._passes import GOOD, aten, graph_of, run, unary

X = randn(4, 8)


class Scaled(nn.Module):
    """A region with a weight, a cast and a size in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.to(torch.float64) * self.scale).to(torch.float32)


def wrong_tanh(r: Rewriter, match: Match) -> None:
    r.replace(match.root, r.call(aten.sin.default, match["x"]))


WRONG = Pass("swap_tanh", "fuse", Call(aten.tanh.default, Var("x")), wrong_tanh)


def script_of(folder: Path) -> subprocess.CompletedProcess[str]:
    (path,) = folder.glob("*.py")
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_reverted_rewrite_leaves_a_script_that_shows_it(tmp_path: Path) -> None:
    graph = capture(Scaled().eval(), (X,))
    outcome, remarks = run([WRONG], graph, [X], reproducers=tmp_path)
    (rewrite,) = outcome.rewrites
    assert not rewrite.kept
    (remark,) = remarks.of_kind("missed")
    (path,) = tmp_path.glob("*.py")
    assert f"(see {path})" in remark.reason
    assert path.name == "swap_tanh_tanh.py"
    done = script_of(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "error before" in done.stdout
    assert "exceeds" in done.stdout
    assert "tests/compiler/test_reproducer.py" in path.read_text().replace("\\", "/")


def test_the_folder_can_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPRODUCERS, str(tmp_path / "made"))
    run([WRONG], graph_of(torch.tanh, X), [X])
    assert [path.suffix for path in sorted((tmp_path / "made").iterdir())] == [".py", ".safetensors"]


def test_a_rewrite_that_cannot_be_built_leaves_none(tmp_path: Path) -> None:
    def raising(r: Rewriter, x: torch.fx.Node) -> torch.fx.Node:
        raise ValueError("no")

    run(
        [unary("raises", aten.silu.default, raising), GOOD],
        graph_of(nn.functional.silu, X),
        [X],
        reproducers=tmp_path,
    )
    assert list(tmp_path.iterdir()) == []
