"""The demo, as ``make demo`` runs it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo_agrees_with_the_original_and_writes_the_report(tmp_path: Path) -> None:
    program = "import runpy; runpy.run_module('examples.demo', run_name='__main__')"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "neighbours" in done.stdout
    assert "similarities differ by at most" in done.stdout
    worst = float(done.stdout.split("similarities differ by at most")[1].split()[0])
    assert worst < 1e-5
    page = (tmp_path / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "graphopt.attention" in page
