"""Cases in narrower numbers: who computes in what, what each loses, and what counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from bench.suites import SUITES
from graphopt.bench import page, summary, table
from graphopt.bench.case import failed_row, run_case
from graphopt.bench.loss import lost
from graphopt.bench.peer import Mode, Peer, Problem, eager
from graphopt.bench.peers import PEERS
from graphopt.bench.setting import Case, Setting, command_of
from graphopt.cli.bench import _kinds, grid
from graphopt.errors import InputError
from tests._models import randn, randomised

CPU = torch.device("cpu")


def perceptron() -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))).eval()


def problem(folder: Path, precision: str) -> Problem:
    return Problem(perceptron(), (randn(9, 64),), {}, CPU, folder, precision)


def distance(run: Any, given: Problem) -> float:
    with torch.no_grad():
        wanted = given.model.double()(given.args[0].double())
    given.model.float()
    return lost(run(), [wanted], 1.0).loss


def mode_of(peer: str, given: Problem, name: str) -> Mode:
    return next(mode for mode in PEERS[peer].modes(given) if mode.name == name)


@pytest.mark.parametrize(
    ("peer", "precision", "modes"),
    [
        ("eager", "exact", {"": "exact"}),
        ("eager", "bf16", {"": "exact", "bf16": "bf16"}),
        ("eager", "int8", {"": "exact"}),
        ("inductor", "bf16", {"default": "exact", "max-autotune": "exact", "default, bf16": "bf16",
                              "max-autotune, bf16": "bf16"}),
        ("onnxruntime", "int8", {"": "exact", "int8": "int8"}),
        ("onnxruntime", "int8-static", {"": "exact", "int8": "int8"}),
        ("onnxruntime", "bf16", {"": "exact"}),
        ("openvino", "bf16", {"": "exact", "bf16": "bf16"}),
        ("openvino", "int8", {"": "exact", "int8": "int8"}),
        ("openvino", "int8-static", {"": "exact", "int8-static": "int8-static",
                                     "int8-static within the loss": "int8-static"}),
        ("openvino", "int4", {"": "exact", "int4": "int4"}),
    ],
)  # fmt: skip
def test_peers_run_in_the_precision_where_they_can(
    peer: str, precision: str, modes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.bench.openvino_peer.installed", lambda module: True)
    found = PEERS[peer].modes(problem(tmp_path, precision))
    assert {mode.name: mode.precision for mode in found} == modes


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_eager_computes_in_it_and_leaves_the_model_as_it_was(
    precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    given = problem(tmp_path, precision)
    run = mode_of("eager", given, precision).build(given)
    assert [out.dtype for out in run()] == [dtype]
    assert given.dtype == torch.float32
    assert 1e-5 < distance(run, given) < 0.02
    assert distance(mode_of("eager", given, "").build(given), given) < 1e-6


def test_onnx_runtime_is_quantized_dynamically(tmp_path: Path) -> None:
    given = problem(tmp_path, "int8")
    run = mode_of("onnxruntime", given, "int8").build(given)
    assert 1e-4 < distance(run, given) < 0.05
    assert b"DynamicQuantizeLinear" in (tmp_path / "int8-plain.onnx").read_bytes()


def test_a_transformer_is_quantized_behind_its_optimizer(tmp_path: Path) -> None:
    config = BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    ids = torch.randint(1, 50, (3, 12))
    given = Problem(BertModel(config).eval(), (ids,), {}, CPU, tmp_path, "int8")
    names = [mode.name for mode in PEERS["onnxruntime"].modes(given)]
    assert names == ["", "transformers optimizer", "int8", "transformers optimizer, int8"]
    run = mode_of("onnxruntime", given, names[-1]).build(given)
    assert lost(run(), given.outputs, 0.1).ok


def measured(precision: str, against: tuple[str, ...]) -> dict[str, Any]:
    case = Case("zoo:perceptron", precision=precision)
    row = run_case(case, perceptron(), (randn(9, 64),), {}, Setting(against, rounds=3, threads=1))
    json.dumps(row, allow_nan=False)
    return row


def test_a_row_tells_what_every_side_loses() -> None:
    row = measured("int8", ("eager", "onnxruntime"))
    assert (row["precision"], row["max_loss"]) == ("int8", 0.04)
    own, plain, exported, quantized = row["sides"]
    assert own["precision"] in ("exact", "int8")
    assert (plain["precision"], exported["precision"], quantized["precision"]) == ("exact", "exact", "int8")
    assert plain["loss"] < 1e-6 < 1e-4 < quantized["loss"] <= 0.04
    assert plain["cosine"] == 1.0 > quantized["cosine"] > 0.999
    assert row["ratio"]["eager"]["precision"] == "exact"
    assert "--precision int8" in row["command"]
    assert "eager, exact, " in table.told(row)
    assert summary.label(plain) == "eager, exact"
    assert summary.label(quantized) == "onnxruntime, int8"
    assert summary.accuracy(quantized).startswith("loss 0.0")
    assert "eager, exact" in page.render([row])


def test_a_peer_beyond_the_budget_is_timed_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(given: Problem) -> Any:
        run = eager(given.model, given.args, given.kwargs)
        return lambda: [1.1 * out for out in run()]

    def undefined(given: Problem) -> Any:
        return lambda: [torch.full((9, 64), torch.nan)]

    modes = [Mode("", PEERS["eager"].modes(problem(Path(), "exact"))[0].build)]
    modes += [Mode("off", off, "bf16"), Mode("undefined", undefined, "bf16")]
    monkeypatch.setitem(PEERS, "loose", Peer("loose", lambda given: modes))
    row = measured("bf16", ("loose",))
    _, right, far, broken = row["sides"]
    assert right["counts"]
    assert far["wrong"] == "the loss is 0.1, above the 0.03 allowed"
    assert far["ms"]["median"] > 0
    assert not far["counts"]
    assert far["loss"] == pytest.approx(0.1, rel=1e-3)
    assert far["cosine"] == pytest.approx(1.0)
    assert broken["wrong"] == "the loss is inf, above the 0.03 allowed"
    assert "ms" not in broken
    assert row["ratio"]["loose"]["mode"] == ""


def test_an_exact_row_says_nothing_of_it() -> None:
    row = measured("exact", ("eager",))
    assert not {"precision", "max_loss"} & row.keys()
    assert not {"precision", "loss", "cosine"} & row["sides"][1].keys()
    assert "precision" not in row["ratio"]["eager"]
    assert "--precision" not in row["command"]


def test_loss_and_cosine_are_of_the_worst_output() -> None:
    wanted = [torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, 0.0]).double(), torch.tensor([1, 2])]
    found = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]), torch.tensor([1, 2])]
    verdict = lost(found, wanted, 0.5)
    assert verdict.loss == pytest.approx(1.0)
    assert verdict.cosine == pytest.approx(2**-0.5)
    assert not verdict.ok
    zeros = [torch.zeros(2)]
    assert (lost(zeros, zeros, 0.0).cosine, lost(zeros, [torch.ones(2)], 9.0).cosine) == (1.0, 0.0)


def test_a_case_of_a_precision_is_named_and_typed() -> None:
    exact, narrow = grid(["zoo:model"], [], _kinds(None, "exact, int8,int8"), None, "cpu", 0)
    assert (exact.name, narrow.name) == ("zoo:model cpu", "zoo:model int8 cpu")
    assert "--precision int8 --device cpu" in command_of(narrow, Setting())
    assert failed_row(narrow, Setting(), {"message": "no"})["precision"] == "int8"
    with pytest.raises(InputError, match="precision='int3' is unknown"):
        _kinds(None, "int3")


def test_the_suite_has_every_precision_of_every_encoder() -> None:
    cases = SUITES["cpu-lossy"].cases
    encoders = [case for case in cases if case.spec in ("bench.models:minilm", "bench.models:bert_base")]
    assert {case.precision for case in encoders} == {"int8", "int8-static", "bf16"}
    assert len({(case.spec, *case.sizes.values()) for case in encoders}) == len(encoders) / 3 == 4
    others = {case.precision for case in cases if case not in encoders}
    assert others == {"int8-static", "int8-weights", "int4"}
