"""Results for machines: JUnit XML, SARIF, and the annotations of GitHub and GitLab."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from graphopt.gate.budgets import Budgets
from graphopt.gate.causes import remark_words
from graphopt.gate.finding import Finding, Result, Status

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS: dict[Status, str] = {
    "failed": "error",
    "inconclusive": "warning",
    "improved": "note",
    "changed": "note",
    "skipped": "note",
}
_GITHUB = {"error": "error", "warning": "warning", "note": "notice"}
_GITLAB = {"error": "major", "warning": "minor", "note": "info"}
_PRINTABLE = str.maketrans(
    dict.fromkeys((*range(9), 11, 12, *range(14, 32)), "?")
)  # XML has no such characters


def junit(results: Sequence[Result], budgets: Mapping[str, Budgets]) -> str:
    """JUnit XML: a suite a model, a test case a finding.

    What is inconclusive is an error, a failure or skipped, as ``on_inconclusive`` has it.
    """
    suites = ET.Element("testsuites", name="graphopt check")
    for result in results:
        kinds = {"exit": "error", "fail": "failure", "pass": "skipped"}
        unsure = kinds[budgets[result.model].on_inconclusive]
        suite = ET.SubElement(
            suites,
            "testsuite",
            name=result.model,
            tests=str(len(result.findings)),
            time=f"{result.seconds:.3f}",
        )
        tags = []
        for number, finding in enumerate(result.findings, 1):
            case = ET.SubElement(suite, "testcase", classname=result.model, name=f"{number} {finding.rule}")
            tag = {"failed": "failure", "inconclusive": unsure, "skipped": "skipped"}.get(finding.status)
            if tag:
                tags.append(tag)
                row = ET.SubElement(
                    case, tag, message=finding.message.translate(_PRINTABLE), type=finding.rule
                )
                row.text = "\n".join((*finding.because, finding.source)).translate(_PRINTABLE)
            else:
                ET.SubElement(case, "system-out").text = finding.message.translate(_PRINTABLE)
        for tag, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            suite.set(count, str(tags.count(tag)))
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def sarif(results: Sequence[Result], lock: str) -> str:
    """SARIF 2.1.0: every finding that did not simply pass, and every missed remark, on the user's lines.

    Args:
        results: what was found.
        lock: the lock's path, where a finding without a line of its own is shown.
    """
    rows: list[dict[str, Any]] = []
    for result in results:
        rows += [_sarif_row(result.model, row, _LEVELS[row.status], lock) for row in _told(result)]
        for remark in result.facts["remarks"]:
            row = Finding(
                f"remark-{remark['pass']}",
                "changed",
                remark_words(remark),
                (),
                remark["source"],
                remark["module"],
            )
            rows.append(_sarif_row(result.model, row, "note", lock))
    rules = sorted({row["ruleId"] for row in rows})
    driver = {"name": "graphopt", "version": version("graphopt"), "rules": [{"id": rule} for rule in rules]}
    run = {"tool": {"driver": driver}, "results": rows, "columnKind": "unicodeCodePoints"}
    return json.dumps({"$schema": _SARIF, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _sarif_row(model: str, finding: Finding, level: str, lock: str) -> dict[str, Any]:
    file, line = _place(finding, lock)
    return {
        "ruleId": finding.rule,
        "level": level,
        "message": {"text": _text(model, finding)},
        "locations": [
            {"physicalLocation": {"artifactLocation": {"uri": quote(file)}, "region": {"startLine": line}}}
        ],
        "partialFingerprints": {"graphopt/v1": _fingerprint(model, finding)},
    }


def github(results: Sequence[Result], lock: str) -> str:
    """Workflow commands, which GitHub shows as annotations on the lines of a change."""
    lines = []
    for result in results:
        for finding in _told(result):
            file, line = _place(finding, lock)
            level = _GITHUB[_LEVELS[finding.status]]
            title = _command(f"graphopt {finding.rule}", ":,")
            where = f"file={_command(file, ':,')},line={line},title={title}"
            lines.append(f"::{level} {where}::{_command(_text(result.model, finding))}\n")
    return "".join(lines)


def gitlab(results: Sequence[Result], lock: str) -> str:
    """A code-quality report, which GitLab shows on the lines of a merge request."""
    rows = []
    for result in results:
        for finding in _told(result):
            file, line = _place(finding, lock)
            rows.append(
                {
                    "description": _text(result.model, finding),
                    "check_name": f"graphopt-{finding.rule}",
                    "fingerprint": _fingerprint(result.model, finding),
                    "severity": _GITLAB[_LEVELS[finding.status]],
                    "location": {"path": file, "lines": {"begin": line}},
                }
            )
    return json.dumps(rows, indent=1) + "\n"


def _told(result: Result) -> Iterator[Finding]:
    return (finding for finding in result.findings if finding.status != "passed")


def _text(model: str, finding: Finding) -> str:
    return "\n".join((f"{model}: {finding.message}", *(f"because {cause}" for cause in finding.because)))


def _place(finding: Finding, lock: str) -> tuple[str, int]:
    file, _, line = finding.source.rpartition(":")
    return (file, max(1, int(line))) if file and line.isdecimal() else (lock, 1)


def _fingerprint(model: str, finding: Finding) -> str:
    """The same for the same finding in the next run, whatever its numbers are then."""
    words = "".join(character for character in finding.message if not character.isdigit())
    return hashlib.sha256(f"{model} {finding.rule} {finding.module} {words}".encode()).hexdigest()[:32]


def _command(text: str, more: str = "") -> str:
    for character in f"%\r\n{more}":
        text = text.replace(character, f"%{ord(character):02X}")
    return text
