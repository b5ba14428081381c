"""Whole models through the whole pipeline: float64 decides, not closeness."""

from __future__ import annotations

import functools
import importlib
import json
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import graphopt
from graphopt.capture.inputs import example_tensors
from graphopt.compiler.compare import compare
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.rewriter import Rewriter
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.pattern import Call, Match, Var
from graphopt.optimized_model import OptimizedModel
from tests._models import FAMILIES, MLP, Example, bert, gpt2, llama, mlp, padding, randn, randomised, tokens
from tests.capture._run import captured, example_of, same

PIPELINE = importlib.import_module("graphopt.optimize")  # graphopt.optimize itself is the function
WAYS: dict[str, Any] = {"ort": ("ort", "eager"), "eager": ("eager",), "measured": None}
LATER: dict[str, dict[str, Any]] = {
    "bert": {"batch": 3, "seq": 9, "lengths": (9, 4, 1)},
    "minilm": {"batch": 3, "seq": 9, "lengths": (9, 4, 1)},
    "gpt2": {"batch": 1, "seq": 11},
    "llama": {"batch": 3, "seq": 5, "lengths": (5, 5, 5)},
    "t5": {"batch": 3, "seq": 8},
    "vit": {"batch": 5},
    "cnn": {"batch": 1},
    "mlp": {"batch": 7},
}


@functools.cache
def optimized(family: str, way: str) -> OptimizedModel:
    """With executors that are insisted on, for dynamic sizes; measured, for the example's own.

    A capture is the slowest part of a tiny model, and the same for every way: it is made once.
    """
    given, executors = example_of(family), WAYS[way]
    graph = captured(family, dynamic=executors is not None)
    example = example_tensors(graph.inputs, (given.args, given.kwargs))
    with mock.patch.object(PIPELINE, "capture_any", return_value=(graph.clone(), example)):
        return graphopt.optimize(given.model, given.args, given.kwargs, executors=executors)


def later(family: str) -> Example:
    """Another call of the same model, of other sizes."""
    given, sizes = example_of(family), LATER[family]
    batch, seq = sizes["batch"], sizes.get("seq", 0)
    args = tuple(randn(batch, *arg.shape[1:], seed=5) for arg in given.args)
    made = {
        "input_ids": lambda: tokens(batch, seq, seed=5),
        "decoder_input_ids": lambda: tokens(batch, 3, seed=6),
        "attention_mask": lambda: padding(sizes["lengths"], seq),
        "token_type_ids": lambda: tokens(batch, seq, seed=7) % 2,
    }
    return Example(given.model, args, {name: made[name]() for name in given.kwargs})


def wide(call: Example, family: str) -> list[Any]:
    """The call in float64, through the captured graph."""
    inputs = pytree.tree_leaves((call.args, call.kwargs))
    return outputs(captured(family, dynamic=True), inputs, float64=True)


def check(found: Any, call: Example, family: str) -> None:
    wanted = call()
    assert type(found) is type(wanted)
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    left, right = pytree.tree_leaves(wanted), pytree.tree_leaves(found)
    verdict = compare(left, right, wide(call, family), MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


QUICK = ("bert", "gpt2", "cnn", "mlp")  # to lower and to time; the others are marked slow


def _cases() -> list[Any]:
    return [
        pytest.param(
            family, way, marks=[pytest.mark.slow] if way == "measured" and family not in QUICK else []
        )
        for family in FAMILIES
        for way in WAYS
    ]


@pytest.mark.parametrize(("family", "way"), _cases())
def test_a_model_stays_the_same_model(family: str, way: str) -> None:
    opt, given = optimized(family, way), example_of(family)
    check(opt(*given.args, **given.kwargs), given, family)
    if WAYS[way]:
        other = later(family)
        check(opt(*other.args, **other.kwargs), other, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_done_is_reported(family: str) -> None:
    report = optimized(family, "ort").report
    row = report.to_dict()
    assert row.keys() >= {"ops", "rewrites", "remarks", "candidates", "plan", "memory", "versions"}
    assert row["ops"].keys() == {"before", "after"}
    for rewrite in row["rewrites"]:
        assert rewrite.keys() >= {"pass", "kind", "site", "source", "module", "kept"}
        assert rewrite["kept"], rewrite["reason"]
        assert math.isfinite(rewrite["error_before"])
        assert math.isfinite(rewrite["error_after"])
    for remark in row["remarks"]:
        assert remark.keys() >= {"kind", "pass", "node", "source", "module", "reason", "bytes", "flops", "ms"}
        assert not remark["reason"].startswith("undone"), remark
    assert [candidate["chosen"] for candidate in row["candidates"]].count(True) == 1
    assert {"executor", "ms", "error", "chosen"} <= row["candidates"][0].keys()
    json.loads(json.dumps(row, allow_nan=False, default=str))


def test_rewrites_were_made() -> None:
    made = {family: optimized(family, "ort").report.rewrites_by_pass() for family in FAMILIES}
    assert made["bert"]["fuse_attention"] == 2
    assert made["llama"]["fuse_rms_norm"] >= 4
    assert made["cnn"]["fold_conv_batch_norm"] >= 6
    assert all(sum(made[family].values()) for family in FAMILIES if family != "mlp")


# Padding


@pytest.mark.parametrize("way", ["ort", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_sequence_of_padding_only_is_what_it_was(family: str, way: str) -> None:
    given = example_of(family)
    mask = padding((5, 0, 2), 5)
    kwargs = {"input_ids": tokens(3, 5), "attention_mask": mask, "token_type_ids": mask}
    call = Example(given.model, (), {name: kwargs[name] for name in given.kwargs})
    check(optimized(family, way)(**call.kwargs), call, family)


def test_padding_only_among_the_example_inputs() -> None:
    given = bert()
    kwargs = {**given.kwargs, "attention_mask": padding((7, 0), 7)}
    call = Example(given.model, (), kwargs)
    opt = graphopt.optimize(given.model, (), kwargs, executors=("ort", "eager"), effort="fast")
    check(opt(**kwargs), call, "bert")


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("make", [mlp, bert], ids=["mlp", "bert"])
def test_half_precision_runs_right(make: Any, dtype: torch.dtype) -> None:
    given = make()
    model = given.model.to(dtype)
    args = tuple(arg.to(dtype) for arg in given.args)
    opt = graphopt.optimize(model, args, given.kwargs, effort="fast")
    call = Example(model, args, given.kwargs)
    with torch.no_grad():
        wanted, found = call(), opt(*args, **given.kwargs)
        reference = model.double()(*(arg.double() for arg in args), **given.kwargs)
    assert type(found) is type(wanted)
    sides = [pytree.tree_leaves(side) for side in (wanted, found, reference)]
    assert all(leaf.dtype == dtype for leaf in sides[1])
    verdict = compare(*sides, MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


# KV caches


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_cache_comes_back_as_a_cache(make: Any) -> None:
    given = make(use_cache=True)
    opt = graphopt.optimize(given.model, (), given.kwargs, executors=("eager",), effort="fast")
    found, wanted = opt(**given.kwargs), given()
    assert type(found) is type(wanted)
    assert type(found.past_key_values) is type(wanted.past_key_values)
    assert found.past_key_values.get_seq_length() == 6
    with torch.no_grad():
        reference = given.model.double()(**given.kwargs)
    sides = [pytree.tree_leaves(side) for side in (wanted, found, reference)]
    verdict = compare(*sides, MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


# Exported programs


def test_an_exported_program_is_optimized_like_its_model() -> None:
    model, x = randomised(MLP()), randn(3, 8)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    opt = graphopt.optimize(program, executors=("eager",), effort="fast")
    for given in (x, randn(6, 8, seed=1)):
        with torch.no_grad():
            verdict = compare(model(given), opt(given), model.double()(given.double()), MODEL_FLOOR_ULPS)
            model.float()
        assert verdict.ok, verdict.reason


# Verdicts that are shared are not taken on trust


class Twice(nn.Module):
    """Two layers of one shape; the bias of the second is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid())
        with torch.no_grad():
            self.layers[1].bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * 2


def test_what_only_the_second_layer_shows_is_reverted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    aten = torch.ops.aten

    def forget_bias(r: Rewriter, match: Match) -> None:
        r.replace(match.root, r.call(aten.linear.default, match["x"], match["w"]))

    def spell(r: Rewriter, match: Match) -> None:
        one = r.call(aten.add.Tensor, r.call(aten.exp.default, r.call(aten.neg.default, match["x"])), 1.0)
        r.replace(match.root, r.call(aten.reciprocal.default, one))

    linear = Call(aten.linear.default, Var("x"), Var("w"), Var("b", where=lambda b: b is not None))
    wrong = Pass("forget_bias", "fuse", linear, forget_bias)
    good = Pass("spell_sigmoid", "fuse", Call(aten.sigmoid.default, Var("x")), spell)
    monkeypatch.setattr(PIPELINE, "pipeline", lambda *_: [wrong, good])
    model, x = Twice().eval(), randn(3, 8)
    opt = graphopt.optimize(model, (x,), executors=("eager",), effort="fast")
    kept = [(rewrite.pass_name, rewrite.module) for rewrite in opt.report.rewrites if rewrite.kept]
    assert kept == [("forget_bias", "layers.1"), ("spell_sigmoid", "layers.4")]
    (missed,) = (remark for remark in opt.report.remarks if remark.kind == "missed")
    assert (missed.pass_name, missed.module) == ("forget_bias", "layers.3")
    assert any("every site is verified again" in remark.reason for remark in opt.report.remarks)
    assert len([remark for remark in opt.report.remarks if remark.kind == "passed"]) == 2
    with torch.no_grad():
        verdict = compare(model(x), opt(x), model.double()(x.double()), MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


def test_level_zero_rewrites_nothing() -> None:
    given = mlp()
    opt = graphopt.optimize(given.model, given.args, executors=("eager",), level=0, effort="fast")
    assert list(opt.report.rewrites) == []
    assert opt.report.ops_before == opt.report.ops_after
    assert same(opt(*given.args), given())
