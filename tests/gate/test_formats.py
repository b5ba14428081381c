"""What machines read of a result: JSON, JUnit, SARIF, annotations, Markdown."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from graphopt.gate import formats, render, saved
from graphopt.gate.budgets import Budgets
from graphopt.gate.finding import Finding, Result
from tests.gate.conftest import Project

FINDINGS = [
    Finding(
        "fusions",
        "failed",
        "attention fused 12 -> 0; costs 1.3 ms",
        ("a: b\nc", "after x 1 -> 2"),
        "m/x.py:7",
        "layer.0",
        1.3,
    ),
    Finding("latency-ratio", "inconclusive", "too noisy, 100% of it"),
    Finding("memory", "improved", "less | of <it>"),
    Finding("outputs", "passed", "outputs: \x00 float32"),
    Finding("slowdown", "skipped", "another CPU"),
]


def result(findings: list[Finding] = FINDINGS) -> Result:
    return Result("m:x", findings, {}, {"remarks": []}, seconds=2.0)


def test_every_format_is_written_by_the_command(project: Project, regressed: Path) -> None:
    files = {
        name: f"out.{name}" for name in ("table", "json", "junit", "sarif", "github", "gitlab", "markdown")
    }
    options = [part for name, file in files.items() for part in ("--report", f"{name}={file}")]
    done = project.run("check", "--judge", regressed, *options)
    assert done.exit_code == 1, done.output
    texts = {name: (project.folder / file).read_text() for name, file in files.items()}
    for text in texts.values():
        assert "attention fused 3 -&gt; 0" in text or "attention fused 3 -> 0" in text or r"3 -\> 0" in text
    assert "because fuse_attention: query, key and value differ in batch size" in texts["table"]
    assert json.loads(texts["json"])["exit_code"] == 1
    assert (
        json.loads(project.run("check", "--judge", regressed, "--json").stdout)["format"] == "graphopt-check"
    )
    assert project.run("check", "--judge", regressed, "--report", "github", "-q").stdout == texts["github"]


def test_an_unknown_format_and_a_place_that_cannot_be_written(project: Project, regressed: Path) -> None:
    done = project.run("check", "--judge", regressed, "--report", "pdf=x")
    assert (done.exit_code, "one of: table, json" in done.stderr) == (2, True)
    done = project.run("check", "--judge", regressed, "--report", "json=nowhere/x")
    assert (done.exit_code, "does not exist" in done.stderr) == (2, True)


@pytest.mark.parametrize(("mode", "tag"), [("exit", "error"), ("fail", "failure"), ("pass", "skipped")])
def test_junit(mode: str, tag: str) -> None:
    (suite,) = ET.fromstring(formats.junit([result()], {"m:x": Budgets(on_inconclusive=mode)}))
    assert (suite.get("name"), suite.get("tests")) == ("m:x", "5")
    cases = {str(case.get("name")).split()[1]: case for case in suite}
    failure = cases["fusions"].find("failure")
    assert failure is not None and "after x 1 -> 2" in str(failure.text) and "m/x.py:7" in str(failure.text)
    assert cases["latency-ratio"].find(tag) is not None
    assert cases["slowdown"].find("skipped") is not None
    counts = {
        kind: int(str(suite.get(f"{kind}s" if kind != "skipped" else kind)))
        for kind in ("failure", "error", "skipped")
    }
    assert counts == {
        "failure": 1 + (tag == "failure"),
        "error": int(tag == "error"),
        "skipped": 1 + (tag == "skipped"),
    }


def test_sarif_puts_findings_and_remarks_on_the_users_lines(project: Project, regressed: Path) -> None:
    (found,), _ = saved.judge_again(regressed, {})
    report = json.loads(formats.sarif([found], "graphopt.lock"))
    assert report["version"] == "2.1.0"
    (run,) = report["runs"]
    assert run["tool"]["driver"]["name"] == "graphopt"
    known = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    places = {}
    for row in run["results"]:
        assert (
            row["ruleId"] in known and row["level"] in ("error", "warning", "note") and row["message"]["text"]
        )
        (where,) = row["locations"]
        places[row["ruleId"]] = where["physicalLocation"]
        assert not where["physicalLocation"]["artifactLocation"]["uri"].startswith("/")
        assert where["physicalLocation"]["region"]["startLine"] >= 1
    line = next(
        i
        for i, text in enumerate(regressed.with_name("model.py").read_text().splitlines(), 1)
        if "scaled_dot" in text
    )
    assert places["remark-fuse_attention"] == {
        "artifactLocation": {"uri": "model.py"},
        "region": {"startLine": line},
    }
    assert [row for row in run["results"] if row["ruleId"] == "fusions" and row["level"] == "error"]


def test_a_place_in_sarif_is_a_uri() -> None:
    finding = Finding("fusions", "failed", "less", (), "my models/a b#1.py:3")
    (run,) = json.loads(formats.sarif([result([finding])], "graphopt.lock"))["runs"]
    (where,) = run["results"][0]["locations"]
    assert where["physicalLocation"]["artifactLocation"]["uri"] == "my%20models/a%20b%231.py"


def test_sarif_fingerprints_outlive_other_numbers() -> None:
    def prints(message: str) -> list[str]:
        rows = json.loads(formats.sarif([result([Finding("r", "failed", message)])], "l"))["runs"][0][
            "results"
        ]
        return [row["partialFingerprints"]["graphopt/v1"] for row in rows]

    assert prints("grew by 3 %") == prints("grew by 4 %") != prints("shrank by 4 %")


def test_github_annotations_are_one_line_each() -> None:
    lines = formats.github([result()], "a,b.lock").splitlines()
    assert lines[0] == (
        "::error file=m/x.py,line=7,title=graphopt fusions::m:x: attention fused 12 -> 0; costs 1.3 ms"
        "%0Abecause a: b%0Ac%0Abecause after x 1 -> 2"
    )
    assert lines[1].startswith("::warning file=a%2Cb.lock,line=1,title=graphopt latency-ratio::")
    assert "100%25 of it" in lines[1]
    assert [re.match("::([a-z]+)", line)[1] for line in lines] == ["error", "warning", "notice", "notice"]  # type: ignore[index]


def test_gitlab_rows_have_what_a_code_quality_report_needs() -> None:
    rows = json.loads(formats.gitlab([result()], "graphopt.lock"))
    assert [row["severity"] for row in rows] == ["major", "minor", "info", "info"]
    assert rows[0]["location"] == {"path": "m/x.py", "lines": {"begin": 7}}
    assert rows[1]["location"] == {"path": "graphopt.lock", "lines": {"begin": 1}}
    assert len({row["fingerprint"] for row in rows}) == len(rows)


def test_markdown_escapes_what_would_be_markup() -> None:
    text = render.markdown([result()])
    assert r"less \| of \<it\>" in text
    assert "m:x: regression (1 failed, 1 inconclusive, 1 improved, 1 skipped, 1 passed)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in rows[2:]} == {3}


def test_a_cause_that_several_findings_share_is_told_once() -> None:
    findings = [
        Finding("fusions", "failed", "less", ("the model changed", "x.py changed")),
        Finding("cost-bytes", "failed", "more", ("x.py changed",)),
        Finding("size", "failed", "more", ("weights grew", "x.py changed")),
    ]
    console = Console(width=100)
    with console.capture() as captured:
        render.table([result(findings)], console)
    told = [line.strip() for line in captured.get().splitlines() if "because" in line]
    assert told == [
        "because the model changed",
        "because x.py changed",
        "because of the same as above",
        "because weights grew",
    ]


def test_the_gravest_comes_first() -> None:
    shown = render.shown(result(FINDINGS[::-1]))
    assert [row.status for row in shown] == ["failed", "inconclusive", "improved", "skipped"]
    assert len(render.shown(result(), all_of_them=True)) == 5
