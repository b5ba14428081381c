"""The README's generated parts: tables of recorded results, and examples with what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import RESULTS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_BENCH = re.compile(r"(<!-- bench:(?P<suite>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_EXAMPLE = re.compile(r"(<!-- example:(?P<name>\w+) -->\n).*?(<!-- /example -->)", re.DOTALL)


def update_readme() -> None:
    """Rewrite the README's generated blocks: tables of results, and examples with what they print."""
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
    rows = [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]
    peers = [side for side in rows[0]["ms"] if not side.startswith("graphopt")]
    head = [
        "case",
        "graphopt (ms)",
        *(f"{peer} (ms)" for peer in peers),
        "noise floor",
        "optimize (s)",
        "peak memory",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [row["case"], f"**{row['ms']['graphopt']['median']:.2f}**"]
        cells += [_peer(row, peer) for peer in peers]
        cells += [f"±{100 * _noise(row):.0f}%", f"{row['optimize_s']:.0f}", _peak(row)]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    packages = ("torch", "onnxruntime-gpu", "onnxruntime")
    software = ", ".join(f"{p} {first['versions'][p]}" for p in packages if p in first["versions"])
    note = (
        f"Medians of {2 * first['rounds']} interleaved calls in one process, on {first['threads']} threads of"
        f" an {first['device']}; in brackets how many times as long as graphopt the peer takes, with the 95%"
        f" interval. {software}; commit {first['commit']}, {first['date']}. Again: `{first['command']}`."
    )
    return "\n".join([*lines, "", note, ""])


def _peer(row: dict[str, Any], peer: str) -> str:
    if peer in row["wrong"]:
        return "wrong"
    found = row["ratio"][peer]
    return (
        f"{row['ms'][peer]['median']:.2f} (×{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}])"
    )


def _peak(row: dict[str, Any]) -> str:
    """Of optimizing, the model's own weights included, in multiples of the weights."""
    return f"{1 + row['optimize_peak_bytes'] / row['weights_bytes']:.1f} × weights"


def _noise(row: dict[str, Any]) -> float:
    return max(abs(row["noise"]["low"] - 1), abs(row["noise"]["high"] - 1))
