"""The openvino executor, where its plugin is installed and takes the processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture.export import capture_any
from graphopt.compiler.compare import compare
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import LoweringError
from graphopt.runtime import executors, scheduler, ways
from graphopt.runtime.executors import EXECUTORS, absent
from graphopt.runtime.executors.ort import OpenVino
from graphopt.runtime.executors.ort.providers import OPENVINO
from graphopt.runtime.partition import partition
from graphopt.runtime.target import Target
from tests._models import FAMILIES, MLP, randn, randomised

HOST = Target(torch.device("cpu"))
REASON = absent(EXECUTORS["openvino"], HOST)
here = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Wide(nn.Module):
    """Sums that are long enough for the precision of their terms to show."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


def error_of(precision: Any) -> float:
    """The largest error of a model in a precision, relative to float64."""
    model, x = randomised(Wide()), randn(16, 256)
    graph, inputs = capture_any(model, (x,), None)
    plan = partition(graph, [OpenVino(precision)], HOST, Remarks())
    (found,) = scheduler.run(plan, inputs)
    with torch.no_grad():
        wanted = model.double()(x.double())
    return float((found - wanted).abs().max() / wanted.abs().max())


@here
def test_it_computes_in_the_precision_that_was_asked_for() -> None:
    assert error_of("f32") < 5e-6


@here
def test_bf16_is_had_on_request_alone() -> None:
    found = error_of("bf16")
    if found < 5e-6:
        pytest.skip("this processor does not compute in bf16")
    assert 1e-4 < found < 5e-2


@here
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_model_is_as_exact_as_before(family: str) -> None:
    example = FAMILIES[family]()
    opt = graphopt.optimize(
        example.model, example.args, example.kwargs, executors=("openvino", "eager"), effort="fast"
    )
    rows = [row for row in opt.report.plan if row["executor"] == "openvino"]
    assert rows
    assert all(row["provider"] == OPENVINO and row["providers"][OPENVINO] > 0 for row in rows)
    assert opt.report.chosen.error < 1e-5
    for row in rows:
        for fallback in row["fallbacks"]:
            assert OPENVINO in fallback["reason"] or "ONNX Runtime made it" in fallback["reason"]


@here
def test_sizes_may_vary() -> None:
    model = randomised(MLP())
    opt = graphopt.optimize(
        model, (randn(4, 8),), dynamic={"x": {0: "batch"}}, executors=("openvino",), effort="fast"
    )
    for batch in (1, 4, 9):
        x = randn(8, batch, seed=batch).t()
        with torch.no_grad():
            before, reference = model(x), model.double()(x.double())
            model.float()
        verdict = compare(before, opt(x), reference, MODEL_FLOOR_ULPS)
        assert verdict.ok, verdict.reason


@here
def test_it_is_a_candidate_by_itself() -> None:
    opt = graphopt.optimize(randomised(MLP()), (randn(4, 8),))
    names = [row.name for row in opt.report.candidates]
    assert names[:2] == ["ort", "openvino"]


@here
def test_a_region_of_which_it_takes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.runtime.executors.ort import placement

    monkeypatch.setattr(placement.Placement, "counts", lambda self: {"CPUExecutionProvider": 3})
    with pytest.raises(LoweringError, match="OpenVINO takes no node of the region"):
        graphopt.optimize(randomised(MLP()), (randn(4, 8),), executors=("openvino",))


@pytest.mark.parametrize("installed", [True, False])
def test_a_plugin_that_does_not_load_is_remarked_and_none_is_no_news(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVino, "absent", lambda self, target: "OpenVINO's provider does not load: why")
    monkeypatch.setattr(executors, "openvino_is_installed", lambda: installed)
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None)
    remarks = Remarks()
    found = ways.plan_candidates(graph, graph, None, HOST, remarks)
    assert "openvino" not in [candidate.name for candidate in found]
    said = [row.reason for row in remarks.rows if "openvino" in row.reason]
    assert said == ["openvino is no candidate: OpenVINO's provider does not load: why"] * installed
