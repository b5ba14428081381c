from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.compiler.remarks import Remark
from graphopt.errors import OutputError
from graphopt.observe import summary
from graphopt.observe.report import Report
from graphopt.observe.report_html import render
from tests.observe.conftest import a_report

KEYS = {
    "ops": {"before", "after"},
    "rewrites": {"pass", "kind", "site", "source", "module", "error_before", "error_after", "kept"},
    "remarks": {"kind", "pass", "node", "source", "module", "reason", "bytes", "flops", "ms"},
    "candidates": {"executor", "ms", "error", "chosen"},
    "plan": {"step", "executor"},
    "memory": {"weights", "before", "after"},
    "versions": {"graphopt", "torch"},
}


def refuse(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def rows_of(text: str, title: str) -> list[str]:
    """The rows of a table: what follows its head until the next empty line."""
    table = text[text.index(title) :].split("─\n", 1)[1]
    return [line.strip() for line in table.split("\n\n")[0].split("\n") if line.strip()]


@pytest.mark.parametrize("which", ["report", "real"])
def test_the_keys_are_those_of_the_design(which: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(which).to_dict()
    for key, inner in KEYS.items():
        for row in found[key] if isinstance(found[key], list) else [found[key]]:
            assert inner <= row.keys(), key
        assert found[key], key
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_file_is_strict_json_and_keeps_what_json_cannot_say(report: Report, tmp_path: Path) -> None:
    report.to_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert found["rewrites"][2]["error_after"] == "inf"
    assert float(found["rewrites"][2]["error_after"]) == float("inf")
    assert found["candidates"][1]["error"] == "nan"
    assert found["candidates"][1]["ms"] is None
    assert found["remarks"][4]["bytes"] == "nan"
    assert found["speedup"] == 3.0


def test_places_that_cannot_be_written_are_refused(report: Report, tmp_path: Path) -> None:
    for write in (report.to_json, report.to_html):
        with pytest.raises(OutputError, match="does not exist"):
            write(tmp_path / "missing" / "report")
    assert list(tmp_path.iterdir()) == []


def test_print_shows_every_table(report: Report, hostile: str) -> None:
    text = str(report)
    assert text.startswith(f"Net{hostile} runs on ort, 0.500 ms a call")
    assert "3.00x the speed of eager PyTorch" in text
    assert "verified: 2 of 3 rewrites kept, outputs within 2.2e-07 of float64" in text
    assert rows_of(text, "Candidates")[0].split() == ["ort", "0.500", "0.0100", "3.00x", "2.2e-07", "chosen"]
    assert [line.split() for line in rows_of(text, "Ops: 3 before, 2 after")] == [
        ["aten.gelu", "1", "0", "-1"],
        ["aten.linear", "1", "0", "-1"],
        ["graphopt.linear_activation", "0", "1", "+1"],
    ]
    assert "as many as before: aten.add 1" in text
    passes = [line.split() for line in rows_of(text, "Rewrites, each")]
    assert passes == [
        ["fuse_linear_activation", "fuse", "2", "-", "1", "1.5e-07", "2.5e-07"],
        ["fold_wrong", "fold", "0", "1", "-", "0", "0"],
    ]
    assert rows_of(text, "Plan")[0].split()[:4] == ["region0", "ort", "cpu", "2"]
    missed = [line.split()[0] for line in rows_of(text, "Missed")]
    assert missed == ["fuse_dear", "fuse_cheap"]
    assert rows_of(text, "Missed")[0].split()[-2:] == ["2", "0.500"]
    assert "node_Cast_1" in text
    assert "it fails to run" in text


def test_print_writes_to_stdout(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.print()
    shown = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in shown if line.strip()] == [
        line for line in str(report).split("\n") if line
    ]


def test_a_real_report_says_what_was_fused(real: Report) -> None:
    text = str(real)
    assert "graphopt.linear_activation" in text
    assert "fuse_linear_activation" in text
    assert "not compared with eager PyTorch" in text
    assert repr(real) == f"Report(Block: 5 ops -> 4, runs on {real.chosen.name})"


def test_a_gain_within_the_spread_is_not_claimed(report: Report) -> None:
    ort, inductor, eager = report.candidates
    report.candidates = [ort, inductor, type(eager)(eager.name, 0.51, 0.02, 1e-7)]
    ratio, said = summary.claim(report)
    assert ratio is None
    assert said == "1.02x the speed of eager PyTorch, which is within the spread"
    report.candidates = [type(eager)(eager.name, 0.51, 0.02, 1e-7, chosen=True)]
    assert summary.claim(report)[1] == "eager PyTorch is the fastest here"
    report.candidates = [ort]
    assert report.speedup is None
    assert summary.claim(report)[1] == "not compared with eager PyTorch"


def test_a_model_that_was_put_back_is_not_called_verified(report: Report) -> None:
    assert report.verified
    report.remarks = [Remark("missed", "verify", "", "", "", "all rewrites were reverted")]
    assert not report.verified
    assert report.verdict.startswith("not the same end to end")
    assert report.to_dict()["verdict"] == report.verdict


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (0.38621, "0.386"), (12.345, "12.3"), (1234.5, "1,234"), (4e-5, "0.000040")],
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert summary.ms(value) == text


def test_sizes_and_ratios() -> None:
    assert [summary.size(count) for count in (0, 1023, 1536, 3 * 2**20, 5 * 2**50)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5120.0 TiB",
    ]  # fmt: skip
    assert [summary.times(ratio) for ratio in (None, 0.5, 12.34, 345.6)] == ["-", "0.50x", "12.3x", "346x"]


def test_jsonable_knows_every_kind_of_value() -> None:
    found = summary.jsonable({1: (True, -float("inf"), {"x"}), "path": Path("a")})
    assert found == {"1": [True, "-inf", ["x"]], "path": "a"}


def test_cuda_graphs_are_counted_over_the_steps() -> None:
    made = a_report()
    assert made.cuda_graphs is None
    graphed = {"graphed_nodes": 6, "cuda_graphs": 2, "cuda_graph_bytes": 3 * 2**20, "streams": 3}
    step = {"step": "region0", "device": "cuda:0", "executor": "cuda", "ops": {}}
    made.plan = [{**step, "nodes": 6, **graphed}, {**step, "nodes": 2, "executor": "eager"}]
    assert made.cuda_graphs == {"coverage": 0.75, "count": 2, "bytes": 3 * 2**20, "streams": 3}
    assert made.to_dict()["cuda_graphs"] == made.cuda_graphs
    assert "75% of the nodes in 2 CUDA graphs, whose memory is 3.0 MiB" in str(made)
    assert "75 % of the nodes are in 2 CUDA graphs, whose memory is 3.0 MiB" in render(made)
    made.plan[0]["token_buckets"] = [128, 64]
    assert "3.0 MiB, for up to 64, 128 tokens" in " ".join(str(made).split())
