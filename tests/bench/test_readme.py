"""The README is true: its tables are those of the recorded results, its example is the one that runs."""

import math
import re
import runpy

import pytest

from bench import RESULTS
from bench.readme import README, code_of, with_tables
from bench.suites import SUITES
from graphopt.bench.rows import read
from graphopt.runtime import ways


def test_tables_are_generated_from_the_recorded_results() -> None:
    text = README.read_text()
    assert with_tables(text) == text, "run `python -m bench readme`"


def test_recorded_rows_are_of_cases_that_exist() -> None:
    recorded = [path for path in sorted(RESULTS.glob("*.jsonl")) if path.stem in SUITES]
    assert recorded
    for path in recorded:
        cases = {case.name: case for case in SUITES[path.stem].cases}
        rows = read(path)
        assert len({row["case"] for row in rows}) == len(rows)
        for row in rows:
            assert cases[row["case"]].sizes == row["sizes"]
            assert {"device_name", "versions", "commit", "command", "seed", "noise"} <= set(row)
            assert not row["interrupted"]


def test_the_example_is_the_file_that_runs_and_prints_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ways, "_WORTH_COMPILING_MS", math.inf)  # Inductor compiles for most of a minute
    monkeypatch.setenv("COLUMNS", "110")
    text = README.read_text()
    runpy.run_module("examples.quickstart")
    assert f"```python\n{code_of('quickstart')}\n```" in text
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    assert _shape(shown[1]) & _shape(capsys.readouterr().out) >= _SAID


def _shape(printed: str) -> set[str]:
    """The words that are printed, without numbers, which differ from run to run."""
    return set(re.findall(r"[A-Za-z_.]{4,}", printed))


_SAID = {
    "BertModel",
    "verified",
    "Candidates",
    "graphopt.attention",
    "graphopt.add_layer_norm",
    "fuse_attention",
    "merge_linears",
    "BaseModelOutputWithPoolingAndCrossAttentions",
}
