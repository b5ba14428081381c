"""The example of a user's pass, as its docstring says to run it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_is_kept_at_one_place_and_refused_at_the_other() -> None:
    command = [sys.executable, "-m", "examples.custom_pass"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kept: True, at sqrt" in done.stdout
    assert "passed: 2 nodes -> aten.abs" in done.stdout
    assert "missed: mul is also read by add_2" in done.stdout
