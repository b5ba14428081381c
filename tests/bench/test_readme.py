"""The README is true: its tables are those of the recorded results, its example is the one that runs."""

import json
import re

from bench import RESULTS
from bench.models import SUITES
from bench.readme import README, code_of, output_of, with_tables


def test_tables_are_generated_from_the_recorded_results() -> None:
    text = README.read_text()
    assert with_tables(text) == text, "run `python -m bench readme`"


def test_every_case_of_a_suite_is_recorded_with_its_context() -> None:
    for suite, cases in SUITES.items():
        rows = [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]
        assert {row["case"] for row in rows} == set(cases)
        for row in rows:
            assert {"device", "versions", "commit", "command", "ratio", "noise", "error"} <= set(row)


def test_the_example_is_the_file_that_runs_and_prints_what_is_shown() -> None:
    text = README.read_text()
    assert f"```python\n{code_of('quickstart')}\n```" in text
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    assert _shape(shown[1]) & _shape(output_of("quickstart")) >= _SAID


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
