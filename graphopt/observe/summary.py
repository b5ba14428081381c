"""The report in figures: what the terminal's tables and the page both show, and how numbers are written."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.compiler.remarks import Remark, Rewrite
    from graphopt.observe.report import Candidate, Report

_NUMBERED = re.compile(r"(?<=[A-Za-z])_\d+\b")


@dataclass(frozen=True)
class OpChange:
    """How often an op is called.

    Args:
        op: its name.
        before: calls in the captured graph.
        after: calls in the rewritten graph.
    """

    op: str
    before: int
    after: int

    @property
    def difference(self) -> int:
        """Calls gained; negative for calls lost."""
        return self.after - self.before


@dataclass(frozen=True)
class PassSummary:
    """What a pass did.

    Args:
        name: of the pass.
        kind: ``prune``, ``fold`` or ``fuse``.
        kept: rewrites that stand.
        reverted: rewrites that failed the check.
        shared: rewrites whose verdict is that of an identical region.
        error_before: the worst error of a region as it was, relative to float64.
        error_after: the worst error of a rewrite that stands, likewise; 0 when none stands.
    """

    name: str
    kind: str
    kept: int
    reverted: int
    shared: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Miss:
    """A missed chance: remarks that say the same of several nodes are one.

    Args:
        remark: the first of them.
        count: how many there are.
        ms: what they cost together, in milliseconds a call.
        bytes: the memory traffic that they cost together, in bytes a call.
    """

    remark: Remark
    count: int
    ms: float
    bytes: float


def op_changes(before: Mapping[str, int], after: Mapping[str, int]) -> list[OpChange]:
    """Every op of two graphs, those first whose number changed most."""
    rows = [OpChange(op, before.get(op, 0), after.get(op, 0)) for op in {**before, **after}]
    return sorted(rows, key=lambda row: (-abs(row.difference), -row.before, row.op))


def pass_summaries(rewrites: Iterable[Rewrite]) -> list[PassSummary]:
    """A row a pass, in the order in which they first rewrote something."""
    groups: dict[str, list[Rewrite]] = defaultdict(list)
    for rewrite in rewrites:
        groups[rewrite.pass_name].append(rewrite)
    rows = []
    for name, group in groups.items():
        kept = [rewrite for rewrite in group if rewrite.kept]
        rows.append(
            PassSummary(
                name,
                group[0].kind,
                len(kept),
                len(group) - len(kept),
                sum(rewrite.shared for rewrite in group),
                max(rewrite.error_before for rewrite in group),
                max((rewrite.error_after for rewrite in kept), default=0.0),
            )
        )
    return rows


def misses(remarks: Iterable[Remark]) -> list[Miss]:
    """What was missed, the most expensive first."""
    groups: dict[tuple[str, str], list[Remark]] = defaultdict(list)
    for remark in remarks:
        if remark.kind == "missed":
            groups[remark.pass_name, unnumbered(remark.reason)].append(remark)
    rows = [
        Miss(same[0], len(same), float(sum(r.ms for r in same)), float(sum(r.bytes for r in same)))
        for same in groups.values()
    ]
    return sorted(rows, key=lambda miss: (-miss.ms, -miss.bytes))


def unnumbered(reason: str) -> str:
    """A reason without the numbers of nodes: ``add_3`` is the ``add`` of another layer."""
    return _NUMBERED.sub("", reason)


def speed_ratio(candidate: Candidate, baseline: Candidate | None) -> float | None:
    """How many times faster than the baseline a candidate is; None when one of them was not timed."""
    if baseline is None or not baseline.ms or not candidate.ms:
        return None
    return baseline.ms / candidate.ms


def claim(report: Report) -> tuple[float | None, str]:
    """What the chosen candidate gains over PyTorch: a ratio, and a sentence.

    A difference below the spread is not claimed: the ratio is then None, and the sentence says so.
    """
    chosen, baseline = report.chosen, report.baseline
    ratio = speed_ratio(chosen, baseline)
    if ratio is None or baseline is None or chosen.ms is None or baseline.ms is None:
        return None, "not compared with eager PyTorch"
    if chosen is baseline:
        return ratio, "eager PyTorch is the fastest here"
    noise = (chosen.spread_ms or 0.0) + (baseline.spread_ms or 0.0)
    if abs(baseline.ms - chosen.ms) <= noise:
        return None, f"{times(ratio)} the speed of eager PyTorch, which is within the spread"
    return ratio, f"{times(ratio)} the speed of eager PyTorch"


def times(ratio: float | None) -> str:
    """A ratio: ``1.53x``."""
    if ratio is None:
        return "-"
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def ms(value: float | None) -> str:
    """Milliseconds with three digits that count: ``0.386``, ``12.3``."""
    if value is None:
        return "-"
    if not value or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, min(6, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{digits}f}"


def error(value: float | None) -> str:
    """A relative error: ``2.2e-07``."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What is said of memory before and after, in words: what, and both sizes."""
    before, after = memory["before"], memory["after"]
    return [
        (label, *(("-" if side[key] is None else size(side[key])) for side in (before, after)))
        for key, label in _MEMORY.items()
    ]


_MEMORY = {
    "weights": "the model's own weights",
    "folded": "constants made when compiling",
    "activations": "most activations at once, estimated",
    "block": "activations in one block",
    "measured": "most that PyTorch allocated in a call",
    "workspace": "of these, workspace of kernels",
    "peak": "weights, constants and activations",
}


def size(count: float) -> str:
    """Bytes in the largest fitting binary unit: ``1.5 MiB``."""
    unit, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(unit) >= 1024 and len(units) > 1:
        unit, units = unit / 1024, units[1:]
    return f"{unit:.0f} B" if units[0] == "B" else f"{unit:.1f} {units[0]}"


def short_source(source: str) -> str:
    """The last two parts of a ``file:line``: enough to find it again."""
    return "/".join(Path(source).parts[-2:])


def jsonable(value: Any) -> Any:
    """A value as strict JSON has it.

    A float that JSON has no number for becomes the text ``"inf"``, ``"-inf"`` or ``"nan"``, which Python's
    ``float`` reads back. Tuples become lists, keys text, and what JSON does not know its ``str``.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [jsonable(item) for item in value]
    return str(value)
