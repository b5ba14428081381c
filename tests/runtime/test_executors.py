"""Executors: handed over, dropped, insisted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import LoweringError, TargetError
from graphopt.runtime.executors import EXECUTORS
from graphopt.runtime.executors.eager import EagerProgram
from graphopt.runtime.executors.ort import OrtProgram
from tests._models import MLP, randn, randomised

X = randn(4, 8)


class Middle(nn.Module):
    """An op without ONNX translation between two that have one."""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 4), nn.Linear(4, 8)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.before(x))
        x = self.middle(x)
        return torch.tanh(self.after(x))


MIDDLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bessel": torch.special.bessel_j0,
    "inverse": lambda x: torch.linalg.inv(x + 3 * torch.eye(4)),
    "fourier": lambda x: torch.fft.fft(x).imag,
}


def check(model: nn.Module, opt: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        before = model(x)
        reference = model.double()(x.double())
        model.float()
        verdict = compare(before, opt(x), reference, MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("label", MIDDLES)
def test_an_op_without_translation_splits_the_plan(label: str) -> None:
    model = randomised(Middle(MIDDLES[label]))
    opt = graphopt.optimize(model, (X,), executors=("ort", "eager"), effort="fast")
    assert [row["executor"] for row in opt.report.plan] == ["ort", "eager", "ort"]
    check(model, opt, X)
    check(model, opt, randn(4, 8, seed=1))


def test_an_op_without_translation_is_a_remark() -> None:
    model = randomised(Middle(torch.special.bessel_j0))
    opt = graphopt.optimize(model, (X,), executors=("ort", "eager"), effort="fast")
    (remark,) = (row for row in opt.report.remarks if row.kind == "missed")
    assert remark.pass_name == "partition"
    assert "aten.special_bessel_j0.default has no ONNX translation" in remark.reason
    assert remark.source == f"{__file__}:{_line('x = self.middle(x)')}"


def _line(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def test_ort_alone_refuses_naming_node_line_and_way_out() -> None:
    model = randomised(Middle(torch.special.bessel_j0))
    with pytest.raises(LoweringError) as error:
        graphopt.optimize(model, (X,), executors=("ort",))
    assert "special_bessel_j0" in error.value.message
    assert error.value.where == f"{__file__}:{_line('x = self.middle(x)')}"
    assert "executors=(..., 'eager')" in (error.value.hint or "")


def test_an_executor_that_fails_to_compile_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise LoweringError("out of steam")

    monkeypatch.setattr(EXECUTORS["ort"], "compile", fail, raising=False)
    model = randomised(MLP())
    opt = graphopt.optimize(model, (X,), executors=("ort", "eager"), effort="fast")
    assert {row["executor"] for row in opt.report.plan} == {"eager"}
    assert ("missed", "lower") in {(row.kind, row.pass_name) for row in opt.report.remarks}
    assert any("out of steam" in row.reason for row in opt.report.remarks)
    check(model, opt, X)
    with pytest.raises(LoweringError, match="out of steam"):
        graphopt.optimize(model, (X,), executors=("ort",), effort="fast")


def test_a_candidate_that_gives_wrong_results_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = OrtProgram.run

    def wrong(self: OrtProgram, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        return [result + 1e-3 for result in run(self, inputs)]

    monkeypatch.setattr(OrtProgram, "run", wrong)
    model = randomised(MLP())
    opt = graphopt.optimize(model, (X,), effort="fast")
    rows = {row.name: row for row in opt.report.candidates}
    assert "exceeds" in rows["ort"].reason
    assert not rows["ort"].chosen
    assert opt.report.chosen.name.startswith("eager")
    assert any(row.pass_name == "candidates" and "ort" in row.reason for row in opt.report.remarks)
    check(model, opt, X)
    with pytest.raises(LoweringError, match="no executor gives the right answer"):
        graphopt.optimize(model, (X,), executors=("ort",), effort="fast")


def test_a_candidate_that_fails_to_run_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: OrtProgram, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(OrtProgram, "run", fail)
    model = randomised(MLP())
    opt = graphopt.optimize(model, (X,), effort="fast")
    assert "fails to run: RuntimeError: no such kernel" in opt.report.candidates[0].reason
    check(model, opt, X)


def test_wrong_everywhere_is_an_error_and_no_wrong_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (OrtProgram, EagerProgram):
        monkeypatch.setattr(program, "run", lambda self, inputs: [torch.zeros(4, 8)])
    with pytest.raises(LoweringError, match="no executor gives the right answer"):
        graphopt.optimize(randomised(MLP()), (X,), effort="fast")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    model = randomised(MLP())
    with pytest.raises(TargetError, match=r"unknown executor 'tvm'\s+try: .*ort.*eager"):
        graphopt.optimize(model, (X,), executors=("ort", "tvm"))
    with pytest.raises(TargetError, match="no executor was named"):
        graphopt.optimize(model, (X,), executors=())
    with pytest.raises(TargetError, match=r"unknown target 'tpu'\s+try: one of: auto, cpu"):
        graphopt.optimize(model, (X,), target="tpu")


def test_the_fastest_right_candidate_is_chosen() -> None:
    model = randomised(MLP())
    opt = graphopt.optimize(model, (X,))
    timed = [row for row in opt.report.candidates if row.ms is not None]
    assert len(timed) >= 2
    assert opt.report.chosen.ms == min(row.ms for row in timed if row.ms is not None)
    check(model, opt, X)
