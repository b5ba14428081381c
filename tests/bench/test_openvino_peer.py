"""OpenVINO as a peer: in the precision of the case, or not at all."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphopt.bench.openvino_peer import openvino_modes
from graphopt.bench.peer import Problem, Run
from graphopt.bench.peers import PEERS
from graphopt.compiler.lossy import relative_distance
from graphopt.errors import LoweringError

CPU = torch.device("cpu")


def problem(folder: Path, dtype: torch.dtype = torch.float32, precision: str = "exact") -> Problem:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)).eval()
    return Problem(model.to(dtype), (torch.randn(4, 64).to(dtype),), {}, CPU, folder, precision)


def build(posed: Problem) -> Run:
    """In bfloat16 where that is allowed, else in the model's own type."""
    modes = {mode.precision: mode for mode in openvino_modes(posed)}
    return modes["bf16" if posed.precision == "bf16" else "exact"].build(posed)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.float32, 0.0, 1e-5), (torch.bfloat16, 1e-4, 0.1)]
)
def test_it_computes_in_the_precision_of_the_case(
    dtype: torch.dtype, least: float, most: float, tmp_path: Path
) -> None:
    if reason := PEERS["openvino"].absent(CPU):
        pytest.skip(reason)
    posed = problem(tmp_path, dtype)
    with torch.no_grad():
        try:
            (got,) = build(posed)()
        except LoweringError as error:
            pytest.skip(error.message)  # a processor without bfloat16
        wanted = posed.model.double()(posed.args[0].double())
    assert got.dtype == dtype
    assert least <= float((got - wanted).abs().max() / wanted.abs().max()) < most


@pytest.mark.parametrize(
    ("asked", "hint", "given"), [("exact", "f32", "bf16"), ("int8", "f32", "bf16"), ("bf16", "bf16", "f32")]
)
def test_in_another_precision_it_is_no_peer(
    asked: str, hint: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_model(path: str, device: str, settings: Any) -> Any:
        assert settings["INFERENCE_PRECISION_HINT"] == hint
        return SimpleNamespace(get_property=lambda name: SimpleNamespace(get_type_name=lambda: given))

    core = SimpleNamespace(compile_model=compile_model)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    with pytest.raises(LoweringError, match=f"computes in {given} on this processor, not in {hint}"):
        build(problem(tmp_path, precision=asked))


# NNCF, OpenVINO's own quantization


def distance(run: Run, posed: Problem) -> float:
    return relative_distance(posed.outputs, run())


def test_calibrated_codes_are_its_own_tools(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf")
    if reason := PEERS["openvino"].absent(CPU):
        pytest.skip(reason)
    posed = replace(problem(tmp_path, precision="int8-static"), max_loss=0.04)
    exact, whole, within = openvino_modes(posed)
    assert (whole.precision, within.precision) == ("int8-static", "int8-static")
    assert distance(exact.build(posed), posed) < 1e-5
    assert 1e-3 < distance(whole.build(posed), posed) < 0.1
    assert 1e-3 < distance(within.build(posed), posed) <= 0.04
    assert capfd.readouterr() == ("", "")


def test_layers_that_lose_too_much_stay_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    if reason := PEERS["openvino"].absent(CPU):
        pytest.skip(reason)
    posed = replace(problem(tmp_path, precision="int8-static"), max_loss=1e-3)
    assert distance(openvino_modes(posed)[2].build(posed), posed) <= 1e-3


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.03), ("int8-weights", 0.03), ("int4", 0.2)])
def test_weights_are_compressed(precision: str, most: float, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    if reason := PEERS["openvino"].absent(CPU):
        pytest.skip(reason)
    posed = problem(tmp_path, precision=precision)
    assert 1e-4 < distance(openvino_modes(posed)[1].build(posed), posed) < most


def test_without_that_tool_it_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.bench.openvino_peer.installed", lambda module: module != "nncf")
    assert [mode.name for mode in openvino_modes(problem(tmp_path, precision="int8"))] == [""]
