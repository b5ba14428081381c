"""Planted defects: each is caught, and with its cause."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import onnxruntime
import pytest
import torch

from graphopt import custom_pass
from graphopt.compiler.pass_ import forget
from graphopt.gate.compare import differences
from graphopt.ir.pattern import Call, Var
from tests.gate.conftest import Project, line_of, told

aten = torch.ops.aten

# What noise may improve: times, and the memory that the process holds.
MEASURED = {"latency-ratio", "slowdown", "baseline-slowdown", "throughput", "memory-served"}


def test_what_did_not_change_passes(locked: Project) -> None:
    code, findings = locked.check()
    assert code == 0
    counted = [row for row in findings if row["rule"] not in MEASURED]
    assert {row["status"] for row in counted} <= {"passed", "skipped"}, counted
    assert {row["status"] for row in findings} <= {"passed", "skipped", "improved"}, findings
    assert [row["message"] for row in findings if row["rule"] == "fusions"]


def test_a_fusion_lost_by_a_changed_spelling(locked: Project) -> None:
    locked.edit("k = self.memory.expand(2, 2, 5, 4)", "k = self.memory")
    code, findings = locked.check()
    lost = next(row for row in findings if row["message"].startswith("attention fused 3 -> 0"))
    assert (code, lost["status"]) == (1, "failed")
    assert "query, key and value differ in batch size" in lost["because"][0]
    assert "scaled_dot_product_attention" in lost["because"][0]
    assert lost["source"] == line_of(locked, "F.scaled_dot_product_attention")
    assert "model.py changed" in lost["because"]


def test_a_fusion_that_no_pass_comes_near_any_more(locked: Project) -> None:
    locked.edit("F.gelu(self.up(x))", "torch.special.ndtr(self.up(x))")
    code, findings = locked.check("--max-drift", "off")
    lost = next(row for row in findings if row["message"].startswith("linear activation fused 3 -> 0"))
    assert (code, lost["status"]) == (1, "failed")
    assert "the model now calls layers.* aten.special_ndtr 3 times, not 0" in lost["because"][0]
    assert lost["source"] == line_of(locked, "ndtr")


def test_a_fusion_whose_pass_says_nothing_has_the_reason_of_the_one_that_came_near(locked: Project) -> None:
    by_hand = """        scores = q @ k.transpose(-1, -2) / 2.0
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return (weights @ k)"""
    locked.edit("        return F.scaled_dot_product_attention(q, k, k)", by_hand)
    code, findings = locked.check("--max-drift", "off")
    lost = next(row for row in findings if row["message"].startswith("attention fused 3 -> 0; costs "))
    assert (code, lost["status"]) == (1, "failed")
    assert lost["because"][0].startswith(
        "fuse_softmax: without the maximum subtracted, exp overflows (3 times)"
    )
    assert lost["source"] == line_of(locked, "weights = ")
    regions = next(row for row in findings if row["rule"] == "regions")
    assert regions["status"] == "changed"  # more calls, and where they ran before
    assert not regions["message"].startswith("fell back")
    merged = [row for row in findings if row["message"].startswith("common subexpressions merged 0 -> ")]
    assert {row["status"] for row in merged} <= {"changed"}  # there is more to merge because more is computed


def test_a_layer_computed_twice(locked: Project) -> None:
    locked.edit("            x = layer(x)", "            x = layer(x)\n        x = self.layers[1](x)")
    code, findings = locked.check()
    assert code == 1
    cost = told(findings, "cost-flops")
    assert "the model now calls layers.* aten.add 8 times, not 6 (layers.1, model.py:" in cost["because"][0]
    assert told(findings, "drift")["because"]


def test_an_extra_cast(locked: Project) -> None:
    locked.edit("F.gelu(self.up(x))", "F.gelu(self.up(x).half().float())")
    code, findings = locked.check("--max-drift", "off")
    assert code == 1
    cost = told(findings, "cost-bytes")
    assert any("aten.to" in words or "_to_copy" in words for words in cost["because"])
    assert cost["source"] == line_of(locked, ".half()")
    assert told(findings, "launches")


def test_weights_perturbed_by_a_thousandth(locked: Project) -> None:
    noise = "    with torch.no_grad():\n        model.layers[1].down.weight.mul_(1.001)\n"
    locked.edit(
        "    return model, (torch.randn(2, 3, 8),)", f"{noise}    return model, (torch.randn(2, 3, 8),)"
    )
    code, findings = locked.check()
    drift = told(findings, "drift")
    assert code == 1
    assert drift["because"][0] == "1 of 27 weights are other than in the lock: layers.1.down.weight"
    assert not [row for row in findings if row["status"] == "failed" and row["rule"] != "drift"]


@pytest.fixture
def wrong_pass() -> Iterator[None]:
    @custom_pass("fold", name="fold_gelu_wrongly", after="fuse_attention")
    class _Wrong:
        pattern = Call(aten.gelu.default, Var("x"))

        def rewrite(rewriter: Any, match: Any) -> None:  # noqa: N805
            nearly = rewriter.call(aten.gelu.default, match["x"], approximate="tanh")  # off by 5e-4 at most
            rewriter.replace(match.root, nearly)

    yield
    forget("fold_gelu_wrongly")


def test_a_pass_that_is_subtly_wrong_is_reverted_and_told(locked: Project, wrong_pass: None) -> None:
    code, findings = locked.check()
    found = told(findings, "reverted")
    assert code == 1
    assert "fold_gelu_wrongly: verification reverted 3 rewrites" in found["message"]
    assert "reverted: on the example inputs: error" in found["because"][0]
    assert "fold_gelu_wrongly is new" in found["because"]
    assert found["source"] == line_of(locked, "F.gelu")


@pytest.fixture
def lossy_pass() -> Iterator[None]:
    @custom_pass("fold", name="fold_gelu_at_a_loss", exact=False)
    class _Lossy:
        pattern = Call(aten.gelu.default, Var("x"))

        def rewrite(rewriter: Any, match: Any) -> None:  # noqa: N805
            rewriter.replace(match.root, rewriter.call(aten.silu.default, match["x"]))

    yield
    forget("fold_gelu_at_a_loss")


def test_a_wrong_pass_that_the_allowed_loss_lets_through_is_seen_by_the_gate(
    locked: Project, lossy_pass: None
) -> None:
    """Within ``max_loss`` the optimizer compares with the model that was pruned: its own error is small."""
    locked.change(lambda entry: entry["config"].update(enable=["fold_gelu_at_a_loss"], max_loss=10.0))
    code, findings = locked.check()
    error = told(findings, "error")
    assert code == 1
    assert "fold_gelu_at_a_loss was applied 3 times" in error["because"]
    assert told(findings, "drift", "passed")  # the model itself is what it was


def test_what_the_executor_does_not_take_any_more_falls_back(locked: Project) -> None:
    locked.edit("F.gelu(self.up(x))", "torch.special.airy_ai(self.up(x))")
    code, findings = locked.check("--max-drift", "off")
    regions = told(findings, "regions")
    assert code == 1
    assert regions["message"].startswith("fell back: ")
    assert "has no ONNX translation" in regions["because"][0]
    assert regions["source"] == line_of(locked, "airy_ai")


def test_a_provider_that_does_not_load_any_more(locked: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime opens the session all the same, on another provider, and says so to who asks it."""
    monkeypatch.setattr(
        onnxruntime.InferenceSession,
        "get_providers",
        lambda session: ["AzureExecutionProvider", "CPUExecutionProvider"],
    )
    code, findings = locked.check()
    regions = told(findings, "regions")
    assert code == 1
    assert re.fullmatch(
        r"fell back: ort \(CPUExecutionProvider, cpu\): \d+ -> 0 calls; "
        r"eager \(PyTorch, cpu\): 0 -> \d+ calls",
        regions["message"],
    )
    assert "CPUExecutionProvider does not load here: ONNX Runtime falls back" in regions["because"][0]


@pytest.mark.parametrize(
    ("offered", "why"),
    [
        (["CPUExecutionProvider"], "this ONNX Runtime has only CPUExecutionProvider"),
        (["OpenVINOExecutionProvider", "CPUExecutionProvider"], "a driver that it needs does not load"),
    ],
    ids=["another wheel", "a library is missing"],
)
def test_a_provider_that_falls_back_to_the_cpu(lock_text: str, offered: list[str], why: str) -> None:
    now: dict[str, Any] = json.loads(lock_text)["models"]["model:make"]["facts"]
    locked = copy.deepcopy(now)
    locked["plan"]["regions"][0].update(provider="OpenVINOExecutionProvider")
    now["machine"]["providers"] = offered
    findings = [finding.to_dict() for finding in differences(locked, now)]
    regions = told(findings, "regions")
    assert "; ort (CPUExecutionProvider, cpu): 0 -> " in regions["message"]
    assert regions["because"][0].startswith("ort does not run on OpenVINOExecutionProvider any more: ")
    assert regions["because"][0].endswith(why)
    assert {row["rule"] for row in findings if row["status"] == "failed"} == {"regions"}


def test_memory_doubled(locked: Project) -> None:
    locked.edit("F.gelu(self.up(x))", "F.gelu(self.up(x.repeat(8, 1, 1))).reshape(8, 2, 3, 96).mean(0)")
    code, findings = locked.check("--max-drift", "off")
    memory = told(findings, "memory")
    assert code == 1
    assert "activations: " in memory["because"][0]
    assert "[16, 3, 96]" in memory["because"][1]
    assert "at layers." in memory["because"][1]


def test_an_artifact_twice_as_large(locked: Project) -> None:
    locked.edit(
        "torch.nn.Linear(8, 96), torch.nn.Linear(96, 8)", "torch.nn.Linear(8, 192), torch.nn.Linear(192, 8)"
    )
    code, findings = locked.check("--max-drift", "off")
    size = told(findings, "size")
    assert code == 1
    assert "weights: " in size["because"][0]


@pytest.mark.parametrize(
    ("new", "rule", "method"),
    [
        ("x = layer(x.cpu())", "copies", "Tensor.cpu"),
        ("x = layer(x * x.sum().item())", "syncs", "Tensor.item"),
    ],
)
def test_a_host_copy_in_the_loop(locked: Project, new: str, rule: str, method: str) -> None:
    locked.edit("x = layer(x)", new)
    code, findings = locked.check("--max-drift", "off")
    found = told(findings, rule)
    assert code == 1
    assert f"{method} 0 -> 3" in found["message"]
    assert found["source"] == line_of(locked, new)
    assert found["because"][0] == f"{method} is called at {line_of(locked, new)}"


def test_improvements_are_told_and_never_fail(locked: Project) -> None:
    locked.edit("range(3)", "range(2)")
    code, findings = locked.check("--max-drift", "off", "--max-error", "1")
    assert code == 0, [row for row in findings if row["status"] == "failed"]
    assert told(findings, "cost-flops", "improved")
    assert told(findings, "launches", "improved")
    fewer = {row["message"] for row in findings if row["rule"] == "fusions" and row["status"] == "changed"}
    assert "attention fused 3 -> 2" in fewer


def test_another_version_is_named_as_the_cause(locked: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    locked.change(lambda entry: entry["facts"]["versions"].update(transformers="5.17.0"))
    locked.edit("k = self.memory.expand(2, 2, 5, 4)", "k = self.memory")
    _, findings = locked.check()
    lost = next(row for row in findings if row["message"].startswith("attention fused 3 -> 0"))
    now = sys.modules["transformers"].__version__ if "transformers" in sys.modules else ""
    assert any(words.startswith("after transformers 5.17.0 -> " + now) for words in lost["because"])


def test_a_pass_that_changed_is_named_as_the_cause(locked: Project) -> None:
    locked.change(lambda entry: entry["facts"]["passes"].update(fuse_attention="0" * 16))
    locked.edit("k = self.memory.expand(2, 2, 5, 4)", "k = self.memory")
    _, findings = locked.check()
    lost = next(row for row in findings if row["message"].startswith("attention fused 3 -> 0"))
    assert "the source of fuse_attention changed" in lost["because"]


def test_a_pass_that_is_left_out_is_named_as_the_cause(locked: Project) -> None:
    (locked.folder / "pyproject.toml").write_text('[tool.graphopt]\ndisable = ["fuse_attention"]\n')
    code, findings = locked.check()
    lost = next(row for row in findings if row["message"].startswith("attention fused 3 -> 0"))
    assert code == 1
    assert "fuse_attention does not run any more" in lost["because"]
