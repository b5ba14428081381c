"""Passes that lose something: on request, within the budget, step by step, the loss reported."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.compiler.compare import Comparison
from graphopt.compiler.lossy import Budget, LossyManager, relative_distance
from graphopt.compiler.pass_ import Pass, custom_pass, forget
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.rewriter import Rewriter
from graphopt.errors import InputError
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Call, Match, Var
from tests._models import randn
from tests.compiler._passes import aten, graph_of

X = randn(4, 8)
optimizing = importlib.import_module("graphopt.optimize")  # the name in the package is the function


def scales(x: torch.Tensor) -> torch.Tensor:
    return x * 1.001 * 1.002 * 1.004 * 2.0


def drop(rewriter: Rewriter, match: Match) -> None:
    rewriter.replace(match.root, rewriter.call(aten.neg.default, rewriter.call(aten.neg.default, match["x"])))


DROP = Pass("drop_scale", "prune", Call(aten.mul.Tensor, Var("x"), Var("factor")), drop, exact=False)


def pruned(max_loss: float, **more: Any) -> tuple[Graph, float, Remarks, list[bool]]:
    graph, remarks = graph_of(scales, X), Remarks()
    outcome, loss = LossyManager([DROP], remarks, Budget(max_loss, **more)).run(graph, [X])
    return graph, loss, remarks, [row.kept for row in outcome.rewrites]


@pytest.mark.parametrize(
    ("max_loss", "left"), [(0.0, 4), (0.0015, 3), (0.0035, 2), (0.01, 1), (0.4, 1), (0.6, 0)]
)
def test_it_goes_on_while_the_loss_is_within_the_budget(max_loss: float, left: int) -> None:
    graph, loss, remarks, kept = pruned(max_loss)
    assert graph.op_counts().get("aten.mul", 0) == left
    assert loss <= max_loss
    assert sum(kept) == 4 - left
    graph.check()
    (said,) = remarks.of_kind("analysis")
    assert f"of the {max_loss:.3g} allowed" in said.reason
    assert all("above the" in row.reason for row in remarks.of_kind("missed"))


def test_the_users_metric_decides() -> None:
    graph, loss, _, _ = pruned(
        0.1, metric=lambda original, found: 0.05 * float(found[0].mean() != original[0].mean())
    )
    assert graph.op_counts().get("aten.mul", 0) == 0
    assert loss == 0.05
    assert pruned(1.0, metric=lambda original, found: float("nan"))[0].op_counts()["aten.mul"] == 4


def test_a_pass_that_raises_is_reverted() -> None:
    def raising(rewriter: Rewriter, match: Match) -> None:
        rewriter.call(aten.neg.default, match["x"])
        raise ValueError("no")

    graph, remarks = graph_of(scales, X), Remarks()
    rule = Pass("raises", "prune", DROP.pattern, raising, exact=False)
    LossyManager([rule], remarks, Budget(1.0)).run(graph, [X])
    assert graph.op_counts() == {"aten.mul": 4}
    assert "reverted: ValueError: no" in remarks.of_kind("missed")[0].reason


def test_the_default_metric() -> None:
    assert relative_distance([X, 3], [X, 3]) == 0
    assert relative_distance([X], [X * 1.5]) == pytest.approx(0.5)
    assert relative_distance([torch.zeros(2)], [torch.ones(2)]) == float("inf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_infinite_or_undefined_number_is_an_infinite_loss_unless_the_original_has_it(value: float) -> None:
    before, after = torch.tensor([3.0, 4.0, value]), torch.tensor([3.0, 4.5, value])
    assert relative_distance([before], [after]) == pytest.approx(0.1)
    for found in (torch.tensor([3.0, value, value]), torch.tensor([3.0, 4.0, 1.0])):
        assert relative_distance([before], [found]) == float("inf")
    assert relative_distance([torch.ones(3)], [after]) == float("inf")


def test_optimize_runs_them_by_name_within_max_loss_only() -> None:
    @custom_pass("prune", exact=False)
    class DropTanh:
        pattern = Call(aten.tanh.default, Var("x"))

        def rewrite(rewriter: Rewriter, match: Match) -> None:  # noqa: N805
            drop(rewriter, match)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x * 1e-3).relu()

    try:
        plain = graphopt.optimize(Model().eval(), (X,), effort="fast")
        assert "drop_tanh" not in plain.report.rewrites_by_pass()
        assert plain.report.loss is None
        with pytest.raises(InputError, match="max_loss does not say"):
            graphopt.optimize(Model().eval(), (X,), enable=["drop_tanh"])
        with pytest.raises(InputError, match="is no loss"):
            graphopt.optimize(Model().eval(), (X,), enable=["drop_tanh"], max_loss=-1.0)
        lossy = graphopt.optimize(Model().eval(), (X,), enable=["drop_tanh"], max_loss=1e-3, effort="fast")
        assert lossy.report.rewrites_by_pass()["drop_tanh"] == 1
        assert 0 < lossy.report.loss <= 1e-3
        assert lossy.report.to_dict()["loss"] == lossy.report.loss
        assert "at a loss of" in lossy.report.verdict
        torch.testing.assert_close(lossy(X), (X * 1e-3).relu(), atol=1e-8, rtol=1e-5)
    finally:
        forget("drop_tanh")


def test_what_lossy_passes_said_stays_when_the_exact_rewrites_are_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = optimizing.output_reference

    class Doubtful:
        """Says no to the rewritten model, twice, and then what is so."""

        def __init__(self, *given: Any) -> None:
            self.reference, self.calls = real(*given), 0

        def compare(self, after: Any) -> Comparison:
            self.calls += 1
            return Comparison(0.0, 1.0, False, "no") if self.calls <= 2 else self.reference.compare(after)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x * 1e-3) + 0

    @custom_pass("prune", exact=False)
    class DropTanh:
        pattern = Call(aten.tanh.default, Var("x"))

        def rewrite(rewriter: Rewriter, match: Match) -> None:  # noqa: N805
            drop(rewriter, match)

    monkeypatch.setattr(optimizing, "output_reference", Doubtful)
    try:
        found = graphopt.optimize(Model().eval(), (X,), enable=["drop_tanh"], max_loss=1e-3, effort="fast")
    finally:
        forget("drop_tanh")
    assert not found.report.verified
    said = [row.reason for row in found.report.remarks if row.pass_name == "drop_tanh"]
    assert any("the loss is now" in reason for reason in said)
