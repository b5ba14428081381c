from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.manager import BISECT_LIMIT
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.rewriter import Rewriter
from graphopt.errors import PassError
from graphopt.ir.pattern import Call, Match, Var
from tests._models import randn
from tests.compiler._passes import GOOD, LIMITS, aten, good_silu, graph_of, run, unary

X = randn(4, 8)


def four(x: torch.Tensor) -> torch.Tensor:
    for _ in range(4):
        x = torch.nn.functional.silu(x)
    return x


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 9])
def test_the_bisection_limit_applies_the_first_rewrites_exactly(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BISECT_LIMIT, str(limit))
    outcome, _ = run([GOOD], graph_of(four, X), [X])
    assert len(outcome.kept) == min(limit, 4)
    counts = outcome.graph.op_counts()
    assert counts.get("aten.silu", 0) == 4 - min(limit, 4)
    left = [node.op == "call_function" and node.target is aten.silu.default for node in outcome.graph.calls]
    assert not any(left[: 2 * min(limit, 4)])  # it is the first ones that were rewritten


def test_the_bisection_limit_counts_over_passes_and_not_what_was_reverted() -> None:
    def wrong(r: Rewriter, x: torch.fx.Node) -> torch.fx.Node:
        return r.call(aten.mul.Tensor, r.call(aten.silu.default, x), 1.5)

    def spelled(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(four(x))

    tanh = unary("negate_twice", aten.tanh.default, lambda r, x: r.call(aten.neg.default, _minus_tanh(r, x)))
    passes = [unary("wrong", aten.silu.default, wrong), GOOD, tanh]
    for limit, kept in ((3, ["spell_silu"] * 3), (5, ["spell_silu"] * 4 + ["negate_twice"])):
        outcome, _ = run(passes, graph_of(spelled, X), [X], limit=limit)
        assert [rewrite.pass_name for rewrite in outcome.kept] == kept


def _minus_tanh(r: Rewriter, x: torch.fx.Node) -> torch.fx.Node:
    return r.call(aten.tanh.default, r.call(aten.neg.default, x))


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BISECT_LIMIT, "all")
    with pytest.raises(PassError, match="GRAPHOPT_BISECT_LIMIT='all' is not a number"):
        run([GOOD], graph_of(four, X), [X])
    monkeypatch.setenv(BISECT_LIMIT, "")
    assert len(run([GOOD], graph_of(four, X), [X])[0].kept) == 4


def test_a_second_run_changes_nothing() -> None:
    outcome, _ = run([GOOD], graph_of(four, X), [X])
    before = outcome.graph.op_counts()
    again, remarks = run([GOOD], outcome.graph, [X])
    assert again.rewrites == []
    assert remarks.rows == ()
    assert again.graph.op_counts() == before


def test_a_pass_without_an_end_is_stopped_and_said() -> None:
    def swap(r: Rewriter, match: Match) -> None:
        r.replace(match.root, r.call(aten.add.Tensor, match["b"], match["a"]))

    rule = Pass("swap", "fuse", Call(aten.add.Tensor, Var("a"), Var("b")), swap)
    outcome, remarks = run(
        [rule, GOOD], graph_of(lambda x, y: nn.functional.silu(x + y), X, X * 2), [X, X * 2]
    )
    assert [remark.pass_name for remark in remarks.of_kind("analysis")] == ["swap"]
    assert outcome.kept[-1].pass_name == "spell_silu"


class Silu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x)


def test_remarks_tell_source_module_bytes_and_time() -> None:
    def spell(r: Rewriter, match: Match) -> None:
        r.replace(match.root, good_silu(r, r.call(aten.neg.default, match["x"])))

    model = nn.Sequential(Silu(), nn.Sequential(Silu())).eval()
    pattern = Call(aten.silu.default, Call(aten.neg.default, Var("x")))
    graph = capture(nn.Sequential(Negative(), model).eval(), (X,))
    outcome, remarks = run([Pass("spell", "fuse", pattern, spell)], graph, [X])
    (remark,) = remarks.of_kind("passed")
    (rewrite,) = outcome.kept
    assert rewrite.module == remark.module == "1.0"
    assert remark.source == rewrite.source == f"{__file__}:{_line_of('functional.silu(x)', Silu)}"
    assert remark.bytes == 2 * X.numel() * 4  # the negative is neither written nor read
    assert remark.ms == pytest.approx(1e3 * remark.bytes / LIMITS.bytes_per_s)
    assert "2 nodes -> aten.neg" in remark.reason
    assert set(remark.to_dict()) >= {"kind", "pass", "node", "source", "module", "reason", "bytes", "ms"}


class Negative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


def _line_of(text: str, after: type) -> int:
    lines = Path(__file__).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {after.__name__}("))
    return next(i for i, line in enumerate(lines[start:], start + 1) if text in line)


def test_a_refusal_is_a_remark_with_its_reason() -> None:
    rule = unary("spell", aten.silu.default, good_silu, check=lambda match: "not today")
    outcome, remarks = run([rule], graph_of(four, X), [X])
    assert outcome.rewrites == []
    assert [(remark.kind, remark.pass_name, remark.reason) for remark in remarks.rows] == [
        ("missed", "spell", "not today")
    ] * 4


def test_progress_is_told_pass_by_pass() -> None:
    told: list[tuple[str, int, int]] = []
    run([GOOD, GOOD], graph_of(four, X), [X], on_pass=lambda *step: told.append(step))
    assert told == [("spell_silu", 0, 2), ("spell_silu", 1, 2)]


def test_provenance_survives_a_rewrite() -> None:
    from graphopt.ir import provenance

    graph = graph_of(four, X)
    before = {provenance.of(node) for node in graph.calls}
    outcome, _ = run([GOOD], graph, [X])
    assert {provenance.of(node) for node in outcome.graph.calls} == before
