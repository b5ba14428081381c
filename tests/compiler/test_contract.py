"""What a pass may not break: outputs, inputs, functional calls; and who owns the memory of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Call, Match, Var
from tests._models import randn
from tests.compiler._passes import GOOD, aten, graph_of, run

X = randn(4, 8)


def model(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(torch.tanh(x))


def nothing(rewriter: Rewriter, match: Match) -> None:
    """Never called."""


def _to_float64(graph: Graph) -> None:
    (result,) = graph.output.args[0]  # type: ignore[misc]
    with graph.fx.inserting_before(graph.output):
        graph.output.args = (
            (graph.call(aten.to.dtype, (result, torch.float64), {}, result.meta["provenance"]),),
        )


def _one_more(graph: Graph) -> None:
    (result,) = graph.output.args[0]  # type: ignore[misc]
    graph.output.args = ((result, result),)


def _rename_input(graph: Graph) -> None:
    (node,) = graph.placeholders
    node._rename("y")


def _in_place(graph: Graph) -> None:
    (node,) = (node for node in graph.calls if node.target is aten.tanh.default)
    node.target = aten.tanh_.default


def _unordered(graph: Graph) -> None:
    first, second = graph.calls
    second.append(first)


@pytest.mark.parametrize("vandal", [_to_float64, _one_more, _rename_input, _in_place, _unordered])
@pytest.mark.parametrize("rewrites", [False, True])
def test_a_pass_that_goes_behind_the_managers_back_is_undone(
    vandal: Callable[[Graph], None], rewrites: bool
) -> None:
    def pattern(graph: Graph) -> Iterator[Match]:
        vandal(graph)
        if rewrites:
            yield from (
                m for m in (Call(aten.tanh.default, Var("x")).match(graph, n) for n in graph.calls) if m
            )

    def rewrite(rewriter: Rewriter, match: Match) -> None:
        twice = rewriter.call(aten.neg.default, rewriter.call(aten.neg.default, match["x"]))
        rewriter.replace(match.root, rewriter.call(aten.tanh.default, twice))

    graph = graph_of(model, X)
    before = graph.op_counts()
    outcome, remarks = run([Pass("vandal", "fuse", pattern, rewrite), GOOD], graph, [X])
    (remark,) = [row for row in remarks.rows if row.pass_name == "vandal"]
    assert remark.kind == "missed"
    assert remark.reason.startswith("undone: ")
    assert [row.pass_name for row in outcome.kept] == ["spell_silu"]
    outcome.graph.check()
    assert outcome.graph.op_counts()["aten.tanh"] == before["aten.tanh"] == 1


def test_a_rewrite_that_writes_to_its_input_is_reverted() -> None:
    def rewrite(rewriter: Rewriter, match: Match) -> None:
        rewriter.replace(match.root, rewriter.call(aten.tanh_.default, match["x"]))

    graph = graph_of(lambda x: torch.tanh(x + 1), X)
    outcome, remarks = run([Pass("in_place", "fuse", Call(aten.tanh.default, Var("x")), rewrite)], graph, [X])
    (remark,) = remarks.of_kind("missed")
    assert "aten.tanh_.default, which writes to its input" in remark.reason
    assert outcome.kept == []
    assert outcome.graph.op_counts() == {"aten.add": 1, "aten.tanh": 1}


class Aliases(nn.Module):
    """Outputs that are new in PyTorch, and that rewriting makes the input, a weight, or one another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "input": x + 0,
            "view": (x * 1).reshape(-1),
            "clone": x.clone(),
            "weight": self.weight * 2,
            "one": x.relu() + 1,
            "other": x.relu() + 1,
        }


@pytest.mark.parametrize("executor", ["eager", "ort"])
def test_writing_to_an_output_changes_nothing_else(executor: str) -> None:
    x, aliases = randn(4, 8), Aliases().eval()
    optimized = graphopt.optimize(aliases, (x,), executors=(executor,))
    wanted = aliases(x)
    for name in wanted:
        found = optimized(x)
        kept = x.clone()
        found[name].add_(1.0)
        assert torch.equal(x, kept), name
        for other in set(wanted) - {name}:
            assert torch.equal(found[other], wanted[other]), (name, other)
        again: Any = optimized(x)
        assert all(torch.equal(again[key], wanted[key]) for key in wanted), name
    copied = [row.reason for row in optimized.report.remarks if row.pass_name == "own_outputs"]
    assert any("shares memory with input x" in reason for reason in copied)
    assert any("shares memory with output 4" in reason for reason in copied)


def test_outputs_that_were_one_stay_one() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = torch.tanh(x)
            return x, y, y, y.view(-1)

    optimized = graphopt.optimize(Twice().eval(), (X,), executors=("eager",))
    found = optimized(X)
    assert found[0] is X
    assert found[1] is found[2]
    assert found[3].data_ptr() == found[1].data_ptr()
