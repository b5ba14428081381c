"""OpenVINO as a peer: in the precision of the case, or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphopt.bench.onnx_peers import openvino_modes
from graphopt.bench.peer import Problem, Run
from graphopt.bench.peers import PEERS
from graphopt.errors import LoweringError

CPU = torch.device("cpu")


def problem(folder: Path, dtype: torch.dtype = torch.float32, precision: str = "exact") -> Problem:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)).eval()
    return Problem(model.to(dtype), (torch.randn(4, 64).to(dtype),), {}, CPU, folder, precision)


def build(posed: Problem) -> Run:
    """The narrowest of its modes."""
    return openvino_modes(posed)[-1].build(posed)


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
