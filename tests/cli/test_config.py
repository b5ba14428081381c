"""``[tool.graphopt]`` of pyproject.toml: which passes run, the command line adding to it and winning."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt.compiler.pass_ import forget

Run = Callable[..., Any]


def passes_of(run: Run, *args: str) -> set[str]:
    done = run("explain", "zoo:block", "--json", *args)
    assert done.exit_code == 0, done.output
    return {row["pass"] for row in json.loads(done.stdout)["remarks"] if row["kind"] == "passed"}


def configure(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(f"[tool.graphopt]\n{text}\n")


def test_it_switches_passes_and_the_command_line_wins(workspace: Path, run: Run) -> None:
    assert "fuse_linear_activation" in passes_of(run)
    configure(workspace, 'disable = ["fuse_linear_activation"]')
    assert "fuse_linear_activation" not in passes_of(run)
    assert "fuse_linear_activation" in passes_of(run, "--enable", "fuse_linear_activation")
    configure(workspace, 'level = 0\nenable = ["fuse_linear_activation"]')
    assert passes_of(run) == {"fuse_linear_activation"}
    assert len(passes_of(run, "--level", "2")) > 1


def test_a_precision_and_the_command_line_wins(workspace: Path, run: Run) -> None:
    def ran_in(*args: str) -> str:
        done = run("optimize", "zoo:block", "--json", "--effort", "fast", "--executors", "eager", *args)
        assert done.exit_code == 0, done.output
        return str(json.loads(done.stdout)["precision"])

    assert ran_in() == "exact"
    assert ran_in("--precision", "bf16", "--max-loss", "0.2") == "bf16"
    configure(workspace, 'precision = "bf16"')
    assert ran_in("--max-loss", "0.2") == "bf16"
    assert ran_in("--precision", "exact") == "exact"
    configure(workspace, "precision = 8")
    done = run("optimize", "zoo:block")
    assert done.exit_code == 2
    assert "precision = 8 is not a precision" in done.output


def test_it_is_looked_for_upwards(workspace: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(workspace, "level = 0")
    (workspace / "deep").mkdir()
    monkeypatch.syspath_prepend(str(workspace))
    monkeypatch.chdir(workspace / "deep")
    assert passes_of(run) == set()


def test_modules_of_passes_are_imported(workspace: Path, run: Run) -> None:
    (workspace / "house_passes.py").write_text(
        "import torch\n"
        "from graphopt import custom_pass\n"
        "from graphopt.ir.pattern import Call, Var\n\n\n"
        '@custom_pass("fuse", after="remove_noops")\n'
        "class SpellGelu:\n"
        '    pattern = Call(torch.ops.aten.gelu.default, Var("x"))\n\n'
        "    def rewrite(rewriter, match):\n"
        "        half = rewriter.call(torch.ops.aten.mul.Tensor, match['x'], 0.5)\n"
        "        root = rewriter.call(torch.ops.aten.mul.Tensor, match['x'], 0.5**0.5)\n"
        "        erf = rewriter.call(torch.ops.aten.erf.default, root)\n"
        "        one = rewriter.call(torch.ops.aten.add.Tensor, erf, 1.0)\n"
        "        rewriter.replace(match.root, rewriter.call(torch.ops.aten.mul.Tensor, half, one))\n"
    )
    configure(workspace, 'passes = ["house_passes"]\nlevel = 1')
    try:
        assert "spell_gelu" in passes_of(run)
    finally:
        forget("spell_gelu")
        sys.modules.pop("house_passes", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('disabel = ["x"]', "did you mean disable?"),
        ("level = 7", "level = 7 is not a number from 0 to 3"),
        ("level = true", "is not a number"),
        ('enable = "fuse_rope"', "is not a list of names"),
        ('enable = ["fuse_ropes"]', "did you mean fuse_rope"),
        ('passes = ["no_such_module"]', "cannot be imported"),
        ("level = ", "pyproject.toml cannot be read"),
    ],
)
def test_bad_settings(workspace: Path, run: Run, text: str, words: str) -> None:
    configure(workspace, text)
    done = run("explain", "zoo:block")
    assert done.exit_code == 2, done.output
    assert words in done.output
