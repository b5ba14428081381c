"""The README's tables, generated from the recorded results and never typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.runner import RESULTS

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- bench:(?P<suite>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def update_readme() -> None:
    """Rewrite every block between ``<!-- bench:SUITE -->`` and ``<!-- /bench -->``."""
    README.write_text(rendered(README.read_text()))


def rendered(text: str) -> str:
    """The README's text with its tables as the results have them."""
    return _BLOCK.sub(lambda found: found[1] + _table(found["suite"]) + found[3], text)


def _table(suite: str) -> str:
    rows = [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]
    peers = [side for side in rows[0]["ms"] if not side.startswith("graphopt")]
    head = ["case", "graphopt (ms)", *(f"{peer} (ms)" for peer in peers), "noise floor", "optimize (s)"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [row["case"], f"**{row['ms']['graphopt']['median']:.2f}**"]
        cells += [_peer(row, peer) for peer in peers]
        cells += [f"±{100 * _noise(row):.0f}%", f"{row['optimize_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    software = ", ".join(
        f"{name} {first['versions'][name]}"
        for name in ("torch", "onnxruntime-gpu")
        if name in first["versions"]
    )
    note = (
        f"Medians of {2 * first['rounds']} interleaved calls in one process, {first['threads']} threads of an"
        f" {first['device']}; in brackets how many times as long as graphopt, with the 95% interval. {software};"
        f" commit {first['commit']}, {first['date']}. Again: `{first['command']}`."
    )
    return "\n".join([*lines, "", note, ""])


def _peer(row: dict[str, Any], peer: str) -> str:
    if peer in row["wrong"]:
        return "wrong"
    found = row["ratio"][peer]
    return (
        f"{row['ms'][peer]['median']:.2f} (×{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}])"
    )


def _noise(row: dict[str, Any]) -> float:
    return max(abs(row["noise"]["low"] - 1), abs(row["noise"]["high"] - 1))
