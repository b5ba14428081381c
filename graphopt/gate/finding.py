"""What a check finds: one row a comparison, and the verdict over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from graphopt.errors import InputError

Status = Literal["passed", "improved", "changed", "skipped", "inconclusive", "failed"]
Verdict = Literal["pass", "regression", "inconclusive"]

PASS, REGRESSION, INCONCLUSIVE = 0, 1, 3  # exit codes; 2 is wrong use, 4 a fault of graphopt


@dataclass(frozen=True)
class Finding:
    """One comparison and how it came out.

    Args:
        rule: what was compared, a stable name: ``fusions``, ``latency-ratio``.
        status: ``passed``, ``improved`` (told, never fails), ``changed`` (different, neither better nor
            worse), ``skipped`` (could not be compared, and why), ``inconclusive`` or ``failed``.
        message: the effect, in one line.
        because: its causes, the nearest first.
        source: the user's ``file:line`` that it leads to; "" when there is none.
        module: the ``nn.Module`` path.
        ms: what it costs in milliseconds a call, by the roofline of the target; 0 when that is unknown.
    """

    rule: str
    status: Status
    message: str
    because: tuple[str, ...] = ()
    source: str = ""
    module: str = ""
    ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON-ready values."""
        return {**asdict(self), "because": list(self.because)}


@dataclass(frozen=True)
class Result:
    """What the check of one model found.

    Args:
        model: its name in the lock.
        findings: a row a comparison.
        locked: the lock's entry that it was held against.
        facts: what was found of the model now.
        samples: times in milliseconds by side, two a round, in order; empty when nothing was timed.
        waiting: which part of that time the process's threads waited for a core; None where that is not
            known.
        cached: when it was found, if nothing has changed since; "" for a check that ran.
        seconds: what the check took.
    """

    model: str
    findings: Sequence[Finding]
    locked: dict[str, Any]
    facts: dict[str, Any]
    samples: dict[str, list[float]] = field(default_factory=dict)
    waiting: float | None = None
    cached: str = ""
    seconds: float = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each status."""
        return dict(Counter(finding.status for finding in self.findings))

    @property
    def compared(self) -> int:
        """How many comparisons were made."""
        return sum(finding.status != "skipped" for finding in self.findings)

    @property
    def verdict(self) -> Verdict:
        """Regression before inconclusive before pass."""
        found = {finding.status for finding in self.findings}
        return "regression" if "failed" in found else "inconclusive" if "inconclusive" in found else "pass"


def require_compared(results: Sequence[Result]) -> None:
    """A check that checked nothing fails.

    Raises:
        InputError: there is no result, or one of them compared nothing.
    """
    if not results:
        raise InputError(
            "no model was checked", hint="name a SPEC that is in the lock, or write one with: graphopt lock"
        )
    for result in results:
        if not result.compared:
            skipped = (
                "; ".join(finding.message for finding in result.findings) or "there was nothing to compare"
            )
            raise InputError(
                f"nothing of {result.model} was compared: {skipped}",
                hint=f"graphopt check {result.model} --update",
            )


def exit_code(result: Result, on_inconclusive: str) -> int:
    """0 when it passed, 1 when it regressed, 3 when it could not be told, or what is configured for that."""
    if result.verdict == "inconclusive":
        return {"exit": INCONCLUSIVE, "pass": PASS, "fail": REGRESSION}[on_inconclusive]
    return REGRESSION if result.verdict == "regression" else PASS


def worst(codes: Iterable[int]) -> int:
    """The exit code of several models: a regression before what is inconclusive before a pass."""
    return max(codes, key=(PASS, INCONCLUSIVE, REGRESSION).index, default=PASS)
