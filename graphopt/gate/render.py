"""Results for people: a table on the terminal, and Markdown for a summary page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from graphopt.gate.finding import Finding, Result, Status

_ORDER: tuple[Status, ...] = ("failed", "inconclusive", "improved", "changed", "skipped", "passed")
_STYLE = {"failed": "bold red", "inconclusive": "bold yellow", "improved": "green", "changed": "cyan"}
_VERDICT = {"pass": "bold green", "regression": "bold red", "inconclusive": "bold yellow"}
_ICON = {"pass": "✅", "regression": "❌", "inconclusive": "⚠️"}


def shown(result: Result, *, all_of_them: bool = False) -> list[Finding]:
    """The findings worth a line, the gravest first; those that passed only when asked for."""
    wanted = [f for f in result.findings if all_of_them or f.status != "passed"]
    return sorted(wanted, key=lambda finding: (_ORDER.index(finding.status), -finding.ms))


def headline(result: Result) -> str:
    """The verdict in one line."""
    counts = result.counts
    words = ", ".join(f"{counts[status]} {status}" for status in _ORDER if counts.get(status))
    cached = (
        f"; cached: nothing has changed since {result.cached}"
        if result.cached
        else f" in {result.seconds:.1f} s"
    )
    return f"{result.model}: {result.verdict} ({words}){cached}"


def table(results: Sequence[Result], console: Console, *, all_of_them: bool = False) -> None:
    """Print the results, every finding with its causes below it."""
    for result in results:
        console.print(Text(headline(result), style=_VERDICT[result.verdict]))
        said: set[str] = set()
        for finding in shown(result, all_of_them=all_of_them):
            place = " ".join(filter(None, (finding.source, finding.module)))
            console.print(
                Text.assemble(
                    "  ",
                    (f"{finding.status:<12} ", _STYLE.get(finding.status, "")),
                    f"{finding.rule:<14} {finding.message}",
                    (f"  {place}" if place else "", "dim"),
                )
            )
            fresh = [cause for cause in finding.because if cause not in said]
            for cause in fresh or (["of the same as above"] if finding.because else []):
                console.print(Text(f"{'':<30}because {cause}", style="dim"))
            said |= set(fresh)


def markdown(results: Sequence[Result]) -> str:
    """The results as Markdown: a summary a model, and a table of what differs."""
    parts = ["## graphopt check"]
    for result in results:
        parts.append(f"### {_ICON[result.verdict]} {_escaped(headline(result))}")
        rows = shown(result)
        if rows:
            parts.append("| | what | why | where |\n| --- | --- | --- | --- |\n" + "\n".join(map(_row, rows)))
        parts.append(f"{result.counts.get('passed', 0)} comparisons passed.")
    return "\n\n".join(parts) + "\n"


def _row(finding: Finding) -> str:
    why = "<br>".join(map(_escaped, finding.because))
    where = " ".join(filter(None, (finding.source, finding.module)))
    cells = (finding.status, f"{finding.rule}: {_escaped(finding.message)}", why, _escaped(where))
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    for character in "\\`*_<>|[]#":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
