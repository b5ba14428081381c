"""``precision=``: calibrated 8 bits, convolutions too, and weights in 8 and 4 bits, as users ask for it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.compiler import cpu
from graphopt.compiler.lossy import relative_distance
from graphopt.errors import InputError, TargetError
from graphopt.passes import _blocks
from graphopt.precision import PRECISIONS, require_possible
from graphopt.runtime import executors
from graphopt.runtime.target import Target
from tests._models import CNN, Example, randn, randomised, tokens
from tests._precision import MODEL, Network, X, made_up, needs, optimized, reasons

STATIC, WEIGHTS, INT4 = "quantize_linear_int8_static", "quantize_linear_int8_weights", "quantize_linear_int4"
CASTS = {"int8-static": STATIC, "int8-weights": WEIGHTS, "int4": INT4}
# of the weights' bytes; scales are float32
SHARE = {"int8-static": 0.3, "int8-weights": 0.3, "int4": 0.18}


def lost(model: nn.Module, found: nn.Module, *args: torch.Tensor) -> float:
    with torch.no_grad():
        return relative_distance([model(*args)], [found(*args)])


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        *(("int8-static", way) for way in ("onednn", "ort", "openvino", "eager")),
        *((name, way) for name in ("int8-weights", "int4") for way in ("ort", "openvino", "eager")),
    ],
)
def test_it_runs_within_its_default_loss(name: str, executor: str) -> None:
    needs(executor)
    found = optimized(name, executor)
    assert found.report.precision == name
    assert found.report.chosen.name == f"{executor} ({name})"
    assert 0 < found.report.loss <= PRECISIONS[name].max_loss
    assert found.report.rewrites_by_pass()[CASTS[name]] == 2
    assert lost(MODEL, found, X) == pytest.approx(found.report.loss, rel=1e-3)
    before, after = (found.report.memory[side] for side in ("before", "after"))
    share = (after["weights"] + after["folded"]) / (before["weights"] + before["folded"])
    assert share < SHARE[name]


class Cancelling(Network):
    """The second projection has an offset of 30 in all of its weights, which is taken off behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.up(x))
        return F.linear(h, self.down.weight + 30, self.down.bias) - 30 * h.sum(-1, keepdim=True)


def sensitive() -> nn.Module:
    return randomised(Cancelling()).eval()


@pytest.mark.parametrize("name", CASTS)
def test_a_sensitive_layer_stays_in_float32(name: str) -> None:
    model, most = sensitive(), 0.12 if name == "int4" else 0.03
    found = optimized(name, "ort", model=model, max_loss=most)
    assert found.report.precision == name
    assert found.report.rewrites_by_pass()[CASTS[name]] == 1
    (reason,) = reasons(found.report, CASTS[name])
    assert reason.startswith("kept as it was: alone it loses ")
    assert f"above the {0.9 * most:.3g} allowed" in reason
    assert lost(model, found, X) <= most


@pytest.mark.parametrize("name", CASTS)
def test_the_users_metric_decides(name: str) -> None:
    """Half a per cent of the user's own metric, which nothing may lose here, and everything."""

    def strict(original: Any, found: Any) -> float:
        return float(not torch.equal(original[0], found[0]))

    def easy(original: Any, found: Any) -> float:
        return 0.0049

    assert optimized(name, "ort", metric=strict, max_loss=0.005).report.precision == "exact"
    found = optimized(name, "ort", metric=easy, max_loss=0.005 / 0.9)
    assert (found.report.precision, found.report.loss) == (name, 0.0049)
    with pytest.raises(InputError, match="max_loss does not say by how much"):
        optimized(name, "ort", metric=easy)


@pytest.mark.parametrize("name", CASTS)
def test_what_is_slower_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, lambda candidate: 2.0 if f"({name})" in candidate else 1.0)
    found = graphopt.optimize(MODEL, (X,), precision=name)
    assert any(row.name == f"ort ({name})" and row.ms == 2.0 for row in found.report.candidates)
    assert (found.report.precision, found.report.loss) == ("exact", None)
    assert CASTS[name] not in found.report.rewrites_by_pass()
    (reason,) = reasons(found.report, "precision")
    assert reason.startswith(f"{name} loses 0.")
    assert "is no faster here" in reason
    assert lost(MODEL, found, X) < 1e-5


@pytest.mark.parametrize("name", CASTS)
def test_what_is_faster_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, lambda candidate: 0.5 if candidate == f"ort ({name})" else 1.0)
    assert graphopt.optimize(MODEL, (X,), precision=name).report.chosen.name == f"ort ({name})"


OPENVINO = ("openvino ({})", "openvino, bf16 beside it ({})")


@pytest.mark.openvino
@pytest.mark.parametrize("name", ["int8", *CASTS])
@pytest.mark.parametrize("installed", [True, False])
def test_openvino_is_a_way_to_run_codes(name: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with all else in float32, once in bfloat16 where the processor has it, each held to the loss."""
    needs("openvino")
    monkeypatch.setattr(executors, "openvino_is_installed", lambda: installed)
    first, second = (way.format(name) for way in OPENVINO)
    made_up(monkeypatch, lambda candidate: {first: 0.5, second: 0.4}.get(candidate, 1.0))
    found = graphopt.optimize(MODEL, (X,), precision=name, max_loss=0.1)
    tried = {row.name: row for row in found.report.candidates if "openvino" in row.name}
    assert ({first, second} <= set(tried)) == installed
    if not installed:
        return
    narrow = tried[second]
    if narrow.reason:
        assert narrow.reason == "OpenVINO computes in f32 on this processor, not in bf16"
    assert found.report.chosen.name == (first if narrow.reason else second)
    assert [row["precision"] for row in found.report.plan] == ["f32" if narrow.reason else "bf16"]
    assert 0 < found.report.loss <= 0.1
    assert lost(MODEL, found, X) == pytest.approx(found.report.loss, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("int8", 64), ("int8-weights", 32 if cpu.features().vnni else 0), ("int8-static", 0)],
)
def test_openvino_rounds_no_input_that_the_graph_does_not(name: str, expected: int) -> None:
    """One step for as many numbers as divide the features of all products, and no more than a weight's."""
    needs("openvino")
    (step,) = optimized(name, "openvino").plan.steps
    assert step.program.settings.options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == expected


@pytest.mark.parametrize("name", CASTS)
def test_dynamic_sizes(name: str) -> None:
    found = optimized(name, "ort", dynamic={"x": {0: "rows"}})
    other = randn(4, 64)
    assert lost(MODEL, found, other) < 0.12


@pytest.mark.parametrize("name", CASTS)
def test_plain_onnx_runtime_runs_the_export(name: str, tmp_path: Path) -> None:
    found = optimized(name, "ort")
    for portable in (False, True):
        found.export_onnx(tmp_path / "model.onnx", portable=portable)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        (given,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        assert relative_distance([found(X)], [torch.from_numpy(given)]) < 0.01


# Calibration


def test_further_inputs_widen_the_ranges() -> None:
    large, dynamic = 8 * randn(5, 64), {"x": {0: "rows"}}
    alone = optimized("int8-static", "ort", dynamic=dynamic)
    more = optimized("int8-static", "ort", dynamic=dynamic, calibration=[(large,), {"x": 0.1 * large}])
    assert lost(MODEL, alone, large) > 0.3  # beyond the range all is cut off
    assert lost(MODEL, more, large) < 0.04
    said = [row.reason for row in more.report.remarks if row.pass_name == "precision"]
    assert "ranges of 2 values were observed on 3 inputs, the example's among them" in said


def test_an_iterator_is_read_once() -> None:
    calls = (({"x": x}) for x in (X, 2 * X))
    found = optimized("int8-static", "ort", calibration=calls)
    assert lost(MODEL, found, 2 * X) < 0.04


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("int8-static", [X], "calibration input 0 is a Tensor"),
        ("int8-static", [(X,), (X[:4],)], "calibration input 1: input x has size 4 in dimension 0"),
        ("int8-static", [(X.double(),)], "calibration input 0: input x has dtype torch.float64"),
        ("int8-static", [{"y": X}], "calibration input 0: the call does not fit"),
        ("int8-static", [(X, X)], "calibration input 0: the call does not fit"),
        ("int8", [(X,)], "precision='int8' has no ranges to calibrate"),
        ("exact", [(X,)], "precision='exact' has no ranges to calibrate"),
    ],
)
def test_calibration_that_does_not_fit(name: str, given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        optimized(name, "ort", calibration=given)


def test_inputs_of_zeros_have_no_range() -> None:
    found = graphopt.optimize(
        MODEL, (torch.zeros(9, 64),), precision="int8-static", executors=("eager",), effort="fast"
    )
    assert "the range of its input is not finite, or 0 alone" in reasons(found.report, STATIC)


# Convolutions


IMAGE = randn(4, 3, 20, 20)


@pytest.mark.parametrize("executor", ["ort", "openvino", "eager"])
def test_a_residual_network(executor: str) -> None:
    needs(executor)
    model = randomised(CNN())
    found = graphopt.optimize(
        model, (IMAGE,), precision="int8-static", executors=(executor,), effort="fast", max_loss=0.05
    )
    assert found.report.precision == "int8-static"
    assert found.report.rewrites_by_pass()["quantize_conv_int8"] == 6
    assert "graphopt.conv_activation" not in found.report.ops_after
    assert 0 < lost(model, found, IMAGE) <= 0.05


def test_a_sensitive_convolution_stays_in_float32() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.one(x))
            offset = 30 * F.avg_pool2d(y.sum(1, keepdim=True), 3, 1) * 9
            return F.conv2d(y, self.two.weight + 30, self.two.bias) - offset

    model = randomised(Model())
    found = graphopt.optimize(
        model, (IMAGE,), precision="int8-static", executors=("ort",), effort="fast", max_loss=0.05
    )
    assert found.report.rewrites_by_pass()["quantize_conv_int8"] == 1
    (reason,) = reasons(found.report, "quantize_conv_int8")
    assert "alone it loses" in reason
    assert lost(model, found, IMAGE) <= 0.05


# Decoders


def decoder() -> Example:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=53,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Example(randomised(LlamaForCausalLM(config)), (), {"input_ids": tokens(2, 3), "use_cache": False})


@pytest.mark.parametrize("name", ["int4", "int8-weights"])
def test_every_product_of_a_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q, K and V as one, the output's, gate and up, down, and the head: 4 a layer and 1."""
    monkeypatch.setattr(_blocks, "_MIN_WEIGHTS", 64)
    example = decoder()
    found = graphopt.optimize(
        example.model,
        (),
        example.kwargs,
        precision=name,
        max_loss=0.5,
        effort="fast",
        executors=("ort", "eager"),
    )
    assert found.report.precision == name
    assert found.report.rewrites_by_pass()[CASTS[name]] == 9
    assert found.report.ops_after["graphopt.block_quantized_linear"] == 11
    assert "graphopt.gated_mlp" not in found.report.ops_after
    logits = example().logits
    similar = F.cosine_similarity(found(**example.kwargs).logits, logits, dim=-1)
    assert similar.mean() > (0.95 if name == "int4" else 0.9995)


def test_integers_are_for_the_cpu() -> None:
    for name in CASTS:
        with pytest.raises(TargetError, match=f"'{name}' is for CPUs, and the target is cuda:0"):
            require_possible(name, Target(torch.device("cuda:0")))


# What docs/precision.md says

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "precision.md").read_text()


def test_the_example_of_the_docs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "example.py").write_text(source)
    runpy.run_path(str(tmp_path / "example.py"))
    name, loss = capsys.readouterr().out.split()
    assert (name == "int8-static") == (loss != "None")


def test_the_docs_tell_every_precision_and_its_loss() -> None:
    rows = [line.split("|")[1:-1] for line in TEXT.splitlines() if line.startswith('| `"')]
    told = {
        name: float(most)
        for row in rows
        for name, most in zip(re.findall(r'"([\w-]+)"', row[0]), row[-1].split(","), strict=True)
    }
    assert told == {name: one.max_loss for name, one in PRECISIONS.items()}
