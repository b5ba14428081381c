"""The op, the pass and the test in CONTRIBUTING.md work as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A pytest plugin that installs the files beside it as graphopt.kernels.* and graphopt.passes.*
PLUGIN = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

for folder in ("kernels", "passes"):
    for path in (Path(__file__).parent / folder).glob("*.py"):
        spec = spec_from_file_location(f"graphopt.{folder}.{path.stem}", path)
        sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
"""


def test_the_examples_work(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert [name.split("/")[0] for name in files] == ["kernels", "passes", "tests"]
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "examples_of_contributing.py").write_text(PLUGIN)
    (op,) = (tmp_path / "kernels").glob("*.py")
    (own_test,) = (tmp_path / "tests" / "passes").glob("*.py")

    tests = [str(ROOT / "tests" / "kernels" / "test_ops.py"), str(own_test)]
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "examples_of_contributing", "-k", op.stem]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > text.count("\ndef test_")  # the op's tests were among them
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "D"]
    assert subprocess.run([*ruff, str(tmp_path)], capture_output=True, check=False).returncode == 0
