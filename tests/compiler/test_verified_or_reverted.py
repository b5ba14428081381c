"""Whatever a pass does wrong, it is reverted, reported by name, and the rest of the pipeline goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from graphopt.capture.export import capture
from graphopt.compiler.compare import compare
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.rewriter import Rewriter
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Call, Match, Var
from tests._models import randn
from tests.compiler._passes import GOOD, aten, graph_of, run, unary

X = randn(4, 8)
MASK = torch.ones(2, 1, 4, 4, dtype=torch.bool)
QKV = tuple(randn(2, 2, 4, 8, seed=seed) for seed in range(3))


def model(x: torch.Tensor) -> torch.Tensor:
    """The wrong passes take the tanh, the good one the SiLU."""
    return torch.nn.functional.silu(torch.tanh(x) + x)


def add(value: float) -> Any:
    return lambda r, x: r.call(aten.add.Tensor, r.call(aten.tanh.default, x), value)


def _wrap(r: Rewriter, x: fx.Node) -> fx.Node:
    """x, but for magnitudes above 100."""
    over = r.call(aten.gt.Scalar, r.call(aten.abs.default, x), 100.0)
    return r.call(aten.where.self, over, r.call(aten.neg.default, x), x)


def raising(rewriter: Rewriter, x: fx.Node) -> fx.Node:
    rewriter.call(aten.relu.default, x)  # staged, and to be taken back
    raise ValueError("the rewrite fell over")


def check_raises(match: Match) -> str | None:
    raise ValueError("the check fell over")


def pattern_raises(graph: Graph) -> Iterator[Match]:
    raise ValueError("the pattern fell over")


def nothing(rewriter: Rewriter, match: Match) -> None:
    """Never called."""


def tanh_then(op: Any, *args: Any) -> Any:
    return lambda r, x: r.call(op, r.call(aten.tanh.default, x), *args)


WRONG: dict[str, tuple[Pass, str]] = {
    "subtly wrong": (unary("wrong", aten.tanh.default, add(1e-5)), "on the example inputs: error"),
    "another formula": (
        unary("wrong", aten.tanh.default, lambda r, x: r.call(aten.hardtanh.default, x)),
        "on the example inputs: error",
    ),
    "wrong for large magnitudes": (
        unary("wrong", aten.tanh.default, lambda r, x: r.call(aten.tanh.default, _wrap(r, x))),
        "on large magnitudes: error",
    ),
    "another dtype": (
        unary("wrong", aten.tanh.default, tanh_then(aten.to.dtype, torch.float64)),
        "PassError: wrong would turn torch.float32 [4, 8]",
    ),
    "another shape": (
        unary("wrong", aten.tanh.default, tanh_then(aten.transpose.int, 0, 1)),
        "into torch.float32 [8, 4]",
    ),
    "raises in rewrite": (unary("wrong", aten.tanh.default, raising), "the rewrite fell over"),
    "raises in check": (
        unary("wrong", aten.tanh.default, add(0.0), check=check_raises),
        "its check failed: ValueError: the check fell over",
    ),
    "raises in pattern": (
        Pass("wrong", "fuse", pattern_raises, nothing),
        "undone: ValueError: the pattern fell over",
    ),
}


@pytest.mark.parametrize("label", WRONG)
def test_a_wrong_pass_is_reverted_and_the_rest_goes_on(label: str) -> None:
    wrong, reason = WRONG[label]
    graph = graph_of(model, X)
    before, reference = outputs(graph, [X]), outputs(graph, [X], float64=True)
    outcome, remarks = run([wrong, GOOD], graph.clone(), [X])
    assert outcome.graph.op_counts() == {"aten.tanh": 1, "aten.add": 1, "aten.sigmoid": 1, "aten.mul": 1}
    outcome.graph.check()
    assert [(rewrite.pass_name, rewrite.kept) for rewrite in outcome.kept] == [("spell_silu", True)]
    (missed,) = remarks.of_kind("missed")
    assert missed.pass_name == "wrong"
    assert reason in missed.reason
    assert [remark.pass_name for remark in remarks.of_kind("passed")] == ["spell_silu"]
    after = outputs(outcome.graph, [X])
    assert compare(before, after, reference, MODEL_FLOOR_ULPS).ok


def test_a_reverted_rewrite_tells_its_place_and_its_errors() -> None:
    wrong, _ = WRONG["subtly wrong"]
    outcome, remarks = run([wrong], graph_of(model, X), [X])
    (rewrite,) = outcome.rewrites
    assert not rewrite.kept
    assert 1e-6 < rewrite.error_after < 1e-4
    assert rewrite.error_before < 1e-6
    assert rewrite.source.startswith(f"{__file__}:")
    (remark,) = remarks.rows
    assert (remark.source, remark.node) == (rewrite.source, rewrite.site)


def test_wrong_for_denormals_only_cannot_be_told_from_a_device_that_flushes_them() -> None:
    def flush(r: Rewriter, x: fx.Node) -> fx.Node:
        tiny = r.call(aten.lt.Scalar, r.call(aten.abs.default, x), torch.finfo(torch.float32).tiny)
        zero = r.call(aten.zeros_like.default, x)
        return r.call(aten.tanh.default, r.call(aten.where.self, tiny, zero, x))

    outcome, _ = run([unary("flush", aten.tanh.default, flush)], graph_of(model, X), [X])
    assert outcome.rewrites[0].kept

    def far_off(r: Rewriter, x: fx.Node) -> fx.Node:
        tiny = r.call(aten.lt.Scalar, r.call(aten.abs.default, x), torch.finfo(torch.float32).tiny)
        one = r.call(aten.ones_like.default, x)
        return r.call(aten.tanh.default, r.call(aten.where.self, tiny, one, x))

    outcome, _ = run([unary("far_off", aten.tanh.default, far_off)], graph_of(model, X), [X])
    assert "on denormals" in outcome.rewrites[0].reason


def test_wrong_for_empty_mask_rows_only() -> None:
    """softmax(x + fill) gives an empty row equal weights, and scaled_dot_product_attention none."""

    def spelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def rewrite(r: Rewriter, match: Match) -> None:
        scores = r.call(aten.matmul.default, match["q"], r.call(aten.transpose.int, match["k"], -2, -1))
        scores = r.call(aten.mul.Tensor, scores, 8**-0.5)
        scores = r.call(aten.masked_fill.Scalar, scores, r.call(aten.logical_not.default, match["m"]), -1e9)
        weights = r.call(aten.softmax.int, scores, -1)
        r.replace(match.root, r.call(aten.matmul.default, weights, match["v"]))

    pattern = Call(aten.scaled_dot_product_attention.default, Var("q"), Var("k"), Var("v"), Var("m"))
    mask = MASK.clone()
    outcome, remarks = run(
        [Pass("spell_attention", "fuse", pattern, rewrite)], graph_of(spelled, *QKV, mask), [*QKV, mask]
    )
    assert not outcome.kept
    assert "on masks with empty rows" in remarks.of_kind("missed")[0].reason


def test_a_malformed_graph_is_undone_with_its_remarks() -> None:
    def rewrite(rewriter: Rewriter, match: Match) -> None:
        rewriter.replace(match.root, rewriter.call(aten.tanh.default, match["x"]))
        last = rewriter.graph.output.all_input_nodes[0]
        match["x"].append(last)  # the result, before what it is computed from

    for index, graph in enumerate((graph_of(model, X), graph_of(model, X))):
        rule = Pass("wrong", "fuse", Call(aten.tanh.default, Var("x")), rewrite)
        outcome, remarks = run([rule, GOOD] if index else [GOOD, rule], graph, [X])
        outcome.graph.check()
        assert [rewrite.pass_name for rewrite in outcome.kept] == ["spell_silu"]
        assert [remark.pass_name for remark in remarks.of_kind("passed")] == ["spell_silu"]
        assert [remark.pass_name for remark in remarks.of_kind("missed")] == ["wrong"]
        assert "undone" in remarks.of_kind("missed")[0].reason


def test_nan_and_infinity_neither_hide_an_error_nor_cause_one() -> None:
    weight = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 2.0, 3.0, 4.0, 5.0])

    def weighted(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(torch.tanh(x * weight))

    inputs = X.clone()
    inputs[0, 0], inputs[1, 4] = float("nan"), float("inf")
    outcome, remarks = run([WRONG["subtly wrong"][0], GOOD], graph_of(weighted, inputs), [inputs])
    assert [rewrite.pass_name for rewrite in outcome.kept] == ["spell_silu"]
    assert [remark.pass_name for remark in remarks.of_kind("missed")] == ["wrong"]


# Identical regions


class Layers(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for width in widths)

    def forward(self, *xs: torch.Tensor) -> list[torch.Tensor]:
        found = []
        x = xs[0]
        for index, layer in enumerate(self.layers):
            x = xs[index] if index < len(xs) else x
            x = torch.tanh(layer(x))
            found.append(x)
        return found


def spell_linear(r: Rewriter, match: Match) -> None:
    product = r.call(aten.matmul.default, match["x"], r.call(aten.t.default, match["w"]))
    r.replace(match.root, r.call(aten.add.Tensor, product, match["b"]))


SPELL_LINEAR = Pass(
    "spell_linear", "fuse", Call(aten.linear.default, Var("x"), Var("w"), Var("b")), spell_linear
)


def test_identical_layers_share_a_verdict_and_others_do_not() -> None:
    inputs = (randn(3, 8), randn(3, 8, seed=1), randn(3, 6))
    graph = capture(Layers(8, 8, 6).eval(), inputs)
    outcome, _ = run([SPELL_LINEAR], graph, inputs)
    assert [(rewrite.kept, rewrite.shared) for rewrite in outcome.rewrites] == [
        (True, False),
        (True, True),
        (True, False),
    ]
    outcome, _ = run([SPELL_LINEAR], capture(Layers(8, 8, 6).eval(), inputs), inputs, share=False)
    assert not any(rewrite.shared for rewrite in outcome.rewrites)


def test_what_differs_in_structure_is_not_shared() -> None:
    def forks(x: torch.Tensor, y: torch.Tensor, low: torch.Tensor) -> list[torch.Tensor]:
        return [x - y, y - x, x - x, torch.sub(x, y, alpha=2), low - low]

    def rewrite(r: Rewriter, match: Match) -> None:
        minus = r.call(aten.mul.Tensor, match["b"], -match["alpha"])
        r.replace(match.root, r.call(aten.add.Tensor, match["a"], minus))

    rule = Pass(
        "add_negative", "fuse", Call(aten.sub.Tensor, Var("a"), Var("b"), alpha=Var("alpha")), rewrite
    )
    inputs = [X, randn(4, 8, seed=1), X.half()]
    outcome, _ = run([rule], graph_of(forks, *inputs), inputs)
    # y - x is x - y to the eye of a region; x - x reads one value twice, and half precision is another thing
    assert [rewrite.shared for rewrite in outcome.rewrites] == [False, True, False, False, False]
    assert len(outcome.kept) == 5
