"""The README's generated parts: tables of recorded results, and examples with what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import RESULTS, crossings, gate, rows_of, serving
from bench.markdown import table
from bench.suites import SUITES
from graphopt.bench.rows import read
from graphopt.bench.summary import floor, measured, peers
from graphopt.observe.summary import ms

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_BENCH = re.compile(r"(<!-- bench:(?P<suite>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_ORT = "onnxruntime-gpu", "onnxruntime", "openvino"
_EXAMPLE = re.compile(r"(<!-- example:(?P<name>\w+) -->\n).*?(<!-- /example -->)", re.DOTALL)


def update_tables() -> None:
    """Rewrite the README's tables of results."""
    README.write_text(with_tables(README.read_text()))


def update_readme() -> None:
    """Rewrite all that is generated in the README: tables of results, and examples with what they print."""
    text = with_tables(README.read_text())
    README.write_text(_EXAMPLE.sub(lambda found: found[1] + _example(found["name"]) + found[3], text))


def with_tables(text: str) -> str:
    """The README's text with its tables as the results have them."""
    return _BENCH.sub(lambda found: found[1] + _table(found["suite"]) + found[3], text)


def code_of(name: str) -> str:
    """An example's code, without the docstring that says what it is."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    return source.split('"""\n\n', 1)[1].strip()


def output_of(name: str) -> str:
    """What an example prints."""
    command = [sys.executable, "-m", f"examples.{name}"]
    wide = {**os.environ, "COLUMNS": "110"}
    return subprocess.check_output(command, cwd=ROOT, env=wide, stderr=subprocess.DEVNULL, text=True)


def _example(name: str) -> str:
    lines = [line.rstrip() for line in output_of(name).strip().splitlines()]
    printed = "\n".join(lines)
    return f"```python\n{code_of(name)}\n```\n\nprints\n\n```text\n{printed}\n```\n"


def _table(suite: str) -> str:
    """A suite's recorded rows as Markdown, with where and how they were measured."""
    if suite == "gate":
        return gate.markdown(rows_of(RESULTS / "gate.jsonl"))
    if suite in _OF_THEIR_OWN:
        rows = rows_of(RESULTS / f"{suite}.jsonl")
        return "\n".join([*_OF_THEIR_OWN[suite](rows), "", _where(suite, rows), ""])
    order = [case.name for case in SUITES[suite].cases]
    rows = sorted(measured(read(RESULTS / f"{suite}.jsonl")), key=lambda row: order.index(row["case"]))
    names = peers(rows)
    head = [
        "case",
        "graphopt (ms)",
        *(f"{peer} (ms)" for peer in names),
        "noise floor",
        "optimize (s)",
        "peak memory",
    ]
    cells = [
        [
            row["case"],
            f"**{ms(row['sides'][0]['ms']['median'])}**",
            *(_peer(row, peer) for peer in names),
            floor(row),
            f"{row['optimize']['cold_s']:.0f}",
            _peak(row),
        ]
        for row in rows
    ]
    return "\n".join([*table(head, cells), "", _note(suite, rows), ""])


# Suites whose rows are not of sides against each other, and what makes Markdown of them.
_OF_THEIR_OWN: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "crossings": crossings.markdown,
    "serve": serving.markdown,
}


def _where(suite: str, rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    software = _software(first, ("torch", *_ORT))
    return (
        f"On {first['threads']} threads of an {first['device_name']}. {software}; commit {_commits(rows)}."
        f" Again: `python -m bench {suite}`."
    )


def _software(row: dict[str, Any], packages: Sequence[str]) -> str:
    """Packages with their versions; of ONNX Runtime's two the one that is loaded where both are there."""
    found = {name: row["versions"][name] for name in packages if name in row["versions"]}
    if "onnxruntime-gpu" in found:
        found.pop("onnxruntime", None)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _commits(rows: list[dict[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(f"{row['commit']}, {row['date']}" for row in rows))


def _note(suite: str, rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    on_gpu = first["device"].startswith("cuda")
    machine = (
        f"an {first['device_name']}" if on_gpu else f"{first['threads']} threads of an {first['device_name']}"
    )
    runs_onnx = not on_gpu or "onnxruntime" in peers(rows)
    software = _software(first, ("torch", *(["triton"] if on_gpu else []), *(_ORT if runs_onnx else ())))
    counts = sorted({2 * row["rounds_done"] for row in rows})
    calls = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lost = sum(found["verdict"] == "slower" for row in rows for found in row["ratio"].values())
    total = sum(len(row["ratio"]) for row in rows)
    return (
        f"Medians of {calls} interleaved calls in one process, on {machine}; in brackets how many times as"
        " long as graphopt the peer's best mode takes, with the 95% interval, in italics where it is level:"
        f" within the noise. Of {total} comparisons graphopt lost {lost}. {software}; commit"
        f" {_commits(rows)}."
        f" Again: `python -m bench {suite}`."
    )


def _peer(row: dict[str, Any], peer: str) -> str:
    """The mode of a peer that counts, or why there is none."""
    sides = [side for side in row["sides"] if side["peer"] == peer]
    best = next((side for side in sides if side["counts"]), None)
    if best is None:
        return "wrong" if any("wrong" in side for side in sides) else "failed" if sides else "missing"
    found = row["ratio"][peer]
    said = f"×{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    exact = " exact" if best.get("precision") == "exact" else ""
    return f"{ms(best['ms']['median'])}{exact} ({said if found['verdict'] != 'level' else f'*{said}*'})"


def _peak(row: dict[str, Any]) -> str:
    """Of optimizing, the model's own weights included, in multiples of the weights."""
    return f"{1 + row['optimize']['peak_bytes'] / row['optimize']['weights_bytes']:.1f} × weights"
