"""Kernels for a GPU that is not here: compiled in a process of its own, since here they are interpreted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt.gate.compare import differences
from graphopt.kernels import _triton
from tests.gate.conftest import MODEL, Project, told

ROOT = Path(__file__).resolve().parents[2]
GPU = {"launches": 3, "fused": {"graphopt.rms_norm": 1}, "without_kernel": {}}
ROW = {"variants": 1, "registers": 20, "shared": 64, "spilled": 0}
KEY = "graphopt.rms_norm: _kernel"


def facts(lock_text: str, compiled: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lock_text)["models"]["model:make"]["facts"]
    found["gpu"] = {**copy.deepcopy(GPU), "compiled": compiled}
    found["cost"]["device"] = "h100"
    return found


@pytest.mark.parametrize(
    ("before", "after", "status", "words"),
    [
        ({KEY: ROW}, {KEY: ROW}, "passed", "20 registers a thread, 64 bytes of shared memory"),
        ({KEY: ROW}, {KEY: {**ROW, "registers": 30}}, "changed", "20 -> 30 registers a thread"),
        ({KEY: ROW}, {KEY: {**ROW, "spilled": 8}}, "failed", "0 -> 8 bytes spilled a thread"),
        ({KEY: ROW}, {KEY: {"failed": "no"}}, "failed", "does not compile: no"),
        ({KEY: {"failed": "no"}}, {KEY: {"failed": "no"}}, "failed", "does not compile: no"),
        ({KEY: ROW}, {"graphopt.rms_norm": {"refused": "odd"}}, "failed", "has no kernel: odd"),
        ({}, {"graphopt.rms_norm": {"refused": "odd"}}, "skipped", "has no kernel: odd"),
        ({KEY: ROW}, None, "skipped", "no kernel was compiled for h100"),
        (None, {KEY: ROW}, "passed", "20 registers a thread"),
    ],
)
def test_what_is_said_of_a_kernel(lock_text: str, before: Any, after: Any, status: str, words: str) -> None:
    found = differences(facts(lock_text, before), facts(lock_text, after))
    assert words in told([row.to_dict() for row in found], "kernels", status)["message"]


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
def test_kernels_are_compiled_for_the_gpu(project: Project) -> None:
    shape = "torch.randn(2, 3, 8)"
    project.write(MODEL.replace(f"return model, ({shape},)", f"return model.half(), ({shape}.half(),)"))
    found = {}
    for gpu in ("h100", "l4"):
        command = [sys.executable, "-m", "graphopt", "lock", "model:make", "--name", gpu, "--target", gpu]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(project.folder), str(ROOT)])
        done = subprocess.run(
            command, cwd=project.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found[gpu] = json.loads(project.lock.read_text())["models"][gpu]["facts"]["gpu"]["compiled"]
    assert "aten.linear: _linear_tma_kernel" in found["h100"]
    assert "aten.linear: _linear_kernel" in found["l4"]  # which has no tensor memory accelerator
    attention = found["h100"]["graphopt.attention: _attention_kernel"]
    assert attention["variants"] == 1  # three layers alike
    assert attention["registers"] > 16
    assert attention["spilled"] == 0
    assert all("failed" not in row for rows in found.values() for row in rows.values()), found
