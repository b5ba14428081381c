"""Narrower numbers: a model that tests narrow, and candidates that take as long as a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.observe.report import Report
from graphopt.runtime import candidates
from graphopt.runtime.candidates import Candidate
from graphopt.runtime.executors.openvino.executor import problem
from graphopt.runtime.measure import Timing
from tests._models import randn, randomised

X = randn(9, 64)


class Network(nn.Module):
    """Two projections with an activation between them; each weight has more than 4096 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


MODEL = randomised(Network()).eval()


def needs(executor: str) -> None:
    """Skip the test where OpenVINO is needed, and does not run."""
    if executor == "openvino" and (reason := problem()):
        pytest.skip(reason)


def optimized(name: str, executor: str = "onednn", model: nn.Module = MODEL, **more: Any) -> Any:
    """Nothing is timed: the first candidate that is right runs, and the narrow ones come first."""
    more = {"effort": "fast", "executors": (executor,), **more}
    return graphopt.optimize(model, (X,), precision=name, **more)


def reasons(report: Report, name: str) -> list[str]:
    return [row.reason for row in report.remarks if row.pass_name == name and row.kind == "missed"]


def made_up(monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[str], float]) -> None:
    """Candidates take as long as a function of their names says."""
    known: list[Candidate] = []
    check = candidates._check

    def checked(candidate: Candidate, *given: Any) -> None:
        check(candidate, *given)
        known.append(candidate)

    def timings(runs: Any, **_: Any) -> list[Timing]:
        right = [candidate for candidate in known if candidate.plan is not None]
        return [Timing.of([milliseconds(candidate.name)] * 2) for candidate in right]

    def beside(control: Candidate, candidate: Candidate, *_: Any) -> Timing:
        return Timing.of([milliseconds(candidate.name) / milliseconds(control.name)] * 2)

    def warmed_up(candidate: Candidate, *_: Any) -> Timing:
        return Timing.of([milliseconds(candidate.name)] * 2)

    monkeypatch.setattr(candidates, "_check", checked)
    monkeypatch.setattr(candidates, "_warmed_up", warmed_up)
    monkeypatch.setattr(candidates, "interleaved", timings)
    monkeypatch.setattr(candidates, "_beside", beside)
