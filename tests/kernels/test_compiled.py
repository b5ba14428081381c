"""Every kernel compiles for three GPUs at real sizes, and needs no more of them than was recorded.

After a change that needs more for a reason: ``python -m tests.kernels._compile --record`` on any machine, and
say the reason in the commit.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.kernel_cases import cases
from bench.product_cases import products
from graphopt.ir.op import OPS
from graphopt.kernels import _triton

ROOT = Path(__file__).parent.parent.parent
RECORDED = json.loads((Path(__file__).parent / "compiled.json").read_text())

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")


@functools.cache
def compiled() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels._compile"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    found: dict[str, dict[str, Any]] = json.loads(said.stdout)
    return found


def allowed(name: str) -> dict[str, int]:
    """What was recorded, with room for another version of Triton or ptxas."""
    was = RECORDED[name]
    return {
        "shared": was["shared"] * 5 // 4 + 1024,
        "threads": was["threads"],
        "registers": was["registers"] * 5 // 4 + 8,
        "stack": was["stack"],
        "local": was["local"],
    }


@pytest.mark.parametrize("name", RECORDED)
def test_a_kernel_needs_no_more_than_was_recorded(name: str) -> None:
    assert name in compiled(), "it is compiled no more: record again"
    over = {what: most for what, most in allowed(name).items() if compiled()[name][what] > most}
    assert over == {}, f"recorded: {RECORDED[name]}"


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_recorded_spills_or_starves(name: str) -> None:
    """No registers in memory, and two programs or more on a processor of 65536 registers.

    Of products one is enough: it fills the tensor cores by itself.
    """
    was = RECORDED[name]
    products = "_linear", "_gated_mlp", "_grouped_gated_mlp", "_conv_kernel", "_float8", "_quantized"
    programs = 1 if name.startswith(products) else 2
    assert was["local"] == 0
    assert programs * was["threads"] * was["registers"] <= 65536


@pytest.mark.parametrize("name", RECORDED)
def test_a_kernel_keeps_the_rules_of_dependent_launches(name: str) -> None:
    """As ``kernels/_triton.py`` states them; ``_dependence.py`` reads the code."""
    assert compiled()[name]["hazards"] == []


def test_every_compiled_kernel_is_recorded() -> None:
    assert set(compiled()) == set(RECORDED), "record again"


def test_every_face_has_a_case() -> None:
    found = {case.kernel for case in (*cases(), *products())}
    assert found >= {op.name for op in OPS.values() if op.triton is not None}
