"""What docs/serving.md shows, runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text()


def test_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(examples) == 4
    for source in examples:
        (tmp_path / "example.py").write_text(source)
        runpy.run_path(str(tmp_path / "example.py"))
    printed = capsys.readouterr().out
    assert "'answered': 5" in printed
    assert "requests a second, p99" in printed
    assert "'device': 'gpu" in printed
    assert "ms for 100 requests on 100 devices" in printed
