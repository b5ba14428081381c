"""``precision=``: narrower numbers within a budget, but for sensitive layers, taken where faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt import precision
from graphopt.capture.export import capture_any
from graphopt.compiler import cpu
from graphopt.compiler.lossy import relative_distance
from graphopt.compiler.remarks import Remarks
from graphopt.errors import InputError, TargetError
from graphopt.kernels._triton import Gpu, standing_in_for
from graphopt.passes import quantize_linear_fp8, quantize_linear_int8
from graphopt.runtime import executors, ways
from graphopt.runtime.executors.eager import Eager, EagerProgram
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target
from tests._models import bert, randn, randomised
from tests._precision import MODEL, Network, X, made_up, needs, optimized, reasons

CASTS = {"bf16": "cast_to_bfloat16", "fp16": "cast_to_float16", "int8": "quantize_linear_int8"}


def test_oneDNN_has_float16_where_the_processor_has() -> None:  # noqa: N802
    supported = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    assert optimized("fp16").report.precision == ("fp16" if supported else "exact")


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("bf16", "onednn"),
        ("bf16", "eager"),
        ("fp16", "eager"),
        *(("int8", way) for way in ("onednn", "ort", "openvino", "eager")),
    ],
)
def test_it_runs_within_its_default_loss(name: str, executor: str) -> None:
    needs(executor)
    found = optimized(name, executor)
    assert found.report.precision == name
    assert found.report.chosen.name == f"{executor} ({name})"
    assert 0 < found.report.loss <= precision.PRECISIONS[name].max_loss
    assert found.report.rewrites_by_pass()[CASTS[name]] == 2
    with torch.no_grad():
        lost = relative_distance([MODEL(X)], [found(X)])
    assert lost == pytest.approx(found.report.loss, rel=1e-3)
    assert found(X).dtype == torch.float32
    before, after = (found.report.memory[side] for side in ("before", "after"))
    share = (after["weights"] + after["folded"]) / (before["weights"] + before["folded"])
    assert share < (0.3 if name == "int8" else 0.51)
    assert f"the model in {name}, at a loss of" in found.report.verdict
    assert found.report.to_dict()["precision"] == name


def in_float8(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, *inputs: torch.Tensor, max_loss: float
) -> Any:
    """Optimized with the CPU in the place of a GPU, by the passes of ``precision="fp8"``."""
    monkeypatch.setattr(quantize_linear_fp8, "quantizing_us", lambda *_: -1.0)
    passes = precision.passes_of("fp8")
    with standing_in_for(Gpu((9, 0), 132, 232448)):
        return graphopt.optimize(
            model, inputs, enable=passes, max_loss=max_loss, executors=("eager",), effort="fast"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float8_within_its_default_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in float32 the rest goes in bfloat16."""
    model = randomised(Network()).eval().to(dtype)
    found = in_float8(monkeypatch, model, X.to(dtype), max_loss=precision.PRECISIONS["fp8"].max_loss)
    assert found.report.rewrites_by_pass()["quantize_linear_fp8"] == 2
    assert found.report.ops_after["graphopt.float8_linear"] == 2
    casts = {
        row.shape.split(" ")[0] for row in found.report.graph_after if row.op == "graphopt.float8_linear"
    }
    assert casts == {"float16" if dtype == torch.float16 else "bfloat16"}
    assert 0.01 < found.report.loss <= 0.06
    assert found(X.to(dtype)).dtype == dtype
    with torch.no_grad():
        assert relative_distance([model(X.to(dtype))], [found(X.to(dtype))]) <= 0.06


def test_a_layer_stays_wide_where_both_lose_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Network()).eval().half()
    found = in_float8(monkeypatch, model, X.half(), max_loss=0.04)
    assert found.report.ops_after["graphopt.float8_linear"] == 1
    (reason,) = reasons(found.report, "quantize_linear_fp8")
    assert reason.startswith("kept as it was: alone it loses 0.0")


def test_exact_is_the_default() -> None:
    found = optimized("exact", "eager")
    assert (found.report.precision, found.report.loss) == ("exact", None)
    assert not set(CASTS.values()) & found.report.rewrites_by_pass().keys()


def sensitive() -> nn.Module:
    """A model whose second projection has one weight in each row that dwarfs the others."""
    model = randomised(Network()).eval()
    with torch.no_grad():
        model.down.weight[:, 0] = 1e4
        model.up.weight[0] *= 1e-7
        model.up.bias[0] *= 1e-7  # what the large weights multiply is next to nothing
    return model


def test_a_sensitive_layer_stays_in_float32() -> None:
    model = sensitive()
    found = optimized("int8", model=model, max_loss=0.02)
    assert found.report.rewrites_by_pass()["quantize_linear_int8"] == 1
    (reason,) = reasons(found.report, "quantize_linear_int8")
    assert reason.startswith("kept as it was: alone it loses 0.")
    assert "above the 0.018 allowed" in reason  # a tenth is left for what executors round
    (row,) = (row for row in found.report.remarks if row.reason == reason)
    assert row.ms > 0
    assert row.module == "down"
    assert found.report.loss <= 0.02
    with torch.no_grad():
        assert relative_distance([model(X)], [found(X)]) <= 0.02


def test_a_budget_of_nothing_leaves_the_exact_model() -> None:
    found = optimized("int8", "eager", max_loss=0.0)
    assert found.report.precision == "exact"
    assert found.report.loss is None
    assert len(reasons(found.report, "quantize_linear_int8")) == 2
    with torch.no_grad():
        torch.testing.assert_close(found(X), MODEL(X))


def test_the_users_metric_decides() -> None:
    def changed(original: Any, found: Any) -> float:
        return float((original[0].argmax(-1) != found[0].argmax(-1)).double().mean())

    found = optimized("int8", metric=changed, max_loss=0.0)
    assert found.report.precision == "int8"
    assert found.report.loss == 0
    with pytest.raises(InputError, match="max_loss does not say by how much"):
        optimized("int8", metric=changed)


def test_what_is_slower_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, lambda name: 2.0 if "(int8)" in name else 1.0)
    found = graphopt.optimize(MODEL, (X,), precision="int8")
    assert {"onednn (int8)", "ort (int8)", "eager (int8)"} <= {row.name for row in found.report.candidates}
    assert (found.report.precision, found.report.loss) == ("exact", None)
    assert "quantize_linear_int8" not in found.report.rewrites_by_pass()
    (reason,) = reasons(found.report, "precision")
    assert reason.startswith("int8 loses 0.0")
    assert "is no faster here" in reason


class Rounding(EagerProgram):
    """A region's results, rounded to a dtype."""

    def __init__(self, region: Region, dtype: torch.dtype) -> None:
        super().__init__(region)
        self._dtype = dtype

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        return [result.to(self._dtype).to(result.dtype) for result in super().run(inputs)]


class Hinted(Eager):
    """A stand-in for OpenVINO with its hint: takes the graph in float32, and computes in a dtype."""

    name = "openvino"

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def compile(self, region: Region, target: Target, effort: str) -> EagerProgram:
        return Rounding(region, self._dtype)


BY_HINT = "openvino (bf16, by a hint)"


def with_hint(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, **more: Any) -> Any:
    """Optimized where the stand-in is there, and the fastest."""
    made_up(monkeypatch, lambda name: 1.0 if name == BY_HINT else 2.0)
    monkeypatch.setattr(ways, "hinted", lambda precision, target: Hinted(dtype))
    return graphopt.optimize(MODEL, (X,), precision="bf16", **more)


def test_an_executor_that_narrows_by_itself_is_judged_by_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_hint(monkeypatch, torch.bfloat16)
    assert found.report.chosen.name == BY_HINT
    assert found.report.precision == "bf16"
    with torch.no_grad():
        lost = relative_distance([MODEL(X)], [found(X)])
    assert found.report.loss == pytest.approx(lost, rel=1e-3)
    assert lost > 1e-4
    assert CASTS["bf16"] not in found.report.rewrites_by_pass()  # its graph is the exact one
    assert not {"bfloat16"} & {row.shape.split(" ")[0] for row in found.report.graph_after}
    said = [row.reason for row in found.report.remarks if row.pass_name == "precision"]
    assert f"{BY_HINT} runs the graph as it was, and narrows all of it by itself" in said


def test_one_that_loses_more_than_the_budget_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_hint(monkeypatch, torch.float8_e5m2, max_loss=0.01)
    (row,) = (row for row in found.report.candidates if row.name == BY_HINT)
    assert row.reason.startswith("the loss is 0.")
    assert row.reason.endswith("above the 0.01 allowed")
    assert found.report.chosen.name != BY_HINT


def test_one_that_does_not_narrow_is_no_way_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_hint(monkeypatch, torch.float32)
    (row,) = (row for row in found.report.candidates if row.name == BY_HINT)
    assert "as exactly as in float32" in row.reason
    assert found.report.chosen.name != BY_HINT


@pytest.mark.parametrize(
    ("names", "effort", "expected"),
    [
        (None, "measured", [BY_HINT]),
        (None, "fast", []),
        (["eager"], "measured", []),
        (["openvino"], "fast", [BY_HINT]),
        (["openvino", "eager"], "fast", ["openvino + eager (bf16, by a hint)"]),
    ],
)
def test_when_the_hint_is_tried(
    names: list[str] | None, effort: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, _ = capture_any(MODEL, (X,), None)
    target, no_judge = Target(torch.device("cpu")), cast(Any, None)
    monkeypatch.setattr(ways, "hinted", lambda precision, target: Hinted(torch.bfloat16))
    found = ways.hinted_candidates(graph, "bf16", no_judge, names, target, Remarks(), effort)
    assert [candidate.name for candidate in found] == expected
    assert all(candidate.plan is not None and candidate.graph is graph for candidate in found)


@pytest.mark.parametrize("installed", [True, False])
def test_who_takes_a_hint(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "openvino_is_installed", lambda: installed)
    cpu_target, gpu = Target(torch.device("cpu")), Target(torch.device("cuda:0"))
    found = executors.hinted("bf16", cpu_target)
    assert getattr(found, "precision", None) == ("bf16" if installed else None)
    assert executors.hinted("int8", cpu_target) is None
    assert executors.hinted("bf16", gpu) is None


def test_onnx_runtime_has_no_bfloat16_on_the_cpu() -> None:
    found = optimized("bf16", "ort")
    assert found.report.precision == "exact"
    assert any("torch.bfloat16 cannot be bound" in reason for reason in reasons(found.report, "candidates"))


def test_dynamic_sizes() -> None:
    found = optimized("int8", dynamic={"x": {0: "rows"}})
    other = randn(4, 64)
    with torch.no_grad():
        assert relative_distance([MODEL(other)], [found(other)]) < 0.04


def test_rows_do_not_depend_on_each_other() -> None:
    """A step for each row: a token's result is the same in whatever batch it comes."""
    found = optimized("int8", dynamic={"x": {0: "rows"}})
    large = torch.cat([X, 1e3 * randn(1, 64)])
    torch.testing.assert_close(found(large)[:-1], found(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_transformer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_linear_int8, "_MIN_WEIGHTS", 64)  # its layers are tiny
    example = bert()
    found = graphopt.optimize(
        example.model, kwargs=example.kwargs, precision=name, max_loss=0.1, effort="fast"
    )
    assert found.report.precision == name
    similar = F.cosine_similarity(
        found(**example.kwargs).last_hidden_state, example().last_hidden_state, dim=-1
    )
    assert similar.mean() > 0.995


def test_casts_between_products_are_gone() -> None:
    """What lies between two products in bfloat16 is bfloat16: one cast at either end."""
    found = optimized("bf16")
    ops = found.report.ops_after
    assert ops["aten.to"] == 2
    assert {row.shape.split(" ")[0] for row in found.report.graph_after if "linear" in row.op} == {"bfloat16"}


def test_unknown_and_impossible_precisions() -> None:
    with pytest.raises(InputError, match="precision='int3' is unknown") as error:
        optimized("int3")
    assert "bf16, fp16, fp8, int8" in str(error.value)
    with pytest.raises(TargetError, match="'fp8' is for GPUs, and the target is cpu"):
        optimized("fp8")
    gpu = Target(torch.device("cuda:0"))
    with pytest.raises(TargetError, match="'int8' is for CPUs, and the target is cuda:0"):
        precision.require_possible("int8", gpu)
    precision.require_possible("bf16", gpu)
    for capability, possible in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        with standing_in_for(Gpu(capability, 132, 232448)):
            if possible:
                precision.require_possible("fp8", gpu)
                continue
            with pytest.raises(TargetError, match=r"8\.9 or later, and cuda:0 is sm_80"):
                precision.require_possible("fp8", gpu)


def test_the_processor_is_named() -> None:
    found = optimized("int8")
    said = [row.reason for row in found.report.remarks if row.pass_name == "precision"]
    assert str(cpu.features()) in said[0]
    assert str(cpu.Features(True, False, True, True)) == "bfloat16, VNNI (int8), AMX"
    assert str(cpu.Features(False, False, False, False)) == "none for narrow numbers"
