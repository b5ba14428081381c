"""Wrong use ends in one clear message: what, where in the user's code, and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import CaptureError, GraphoptError, InputError, PassError, TargetError
from tests._models import MLP, randn, randomised

X = randn(3, 8)
MODEL = randomised(MLP())


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.mean() > 0:  # the line that stops capture
            return x
        return -x


def refused(kind: type[GraphoptError], model: nn.Module, *args: Any, **options: Any) -> GraphoptError:
    with pytest.raises(kind) as error:
        graphopt.optimize(model, args, **options)
    found = error.value
    lines = str(found).splitlines()
    assert lines[0] == found.message.splitlines()[0]
    assert len(lines) < 12
    return found


def test_no_inputs_given() -> None:
    error = refused(InputError, MODEL)
    assert error.message == "no example inputs were given for MLP"
    assert error.where == "MLP.forward(x)"
    assert "optimize(model, (x,)" in (error.hint or "")


def test_a_model_that_cannot_be_exported() -> None:
    error = refused(CaptureError, Branching().eval(), X)
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, line in enumerate(lines, 1) if "the line that stops capture" in line)
    assert error.message.startswith("Branching cannot be exported")
    assert error.where == f"{__file__}:{line}"
    assert "no branching on tensor values" in (error.hint or "")


def test_an_input_on_another_device() -> None:
    error = refused(InputError, MODEL, X.to("meta"))
    assert error.message == "input x is on meta, and MLP is on cpu"
    assert error.where == "x"
    assert error.hint == "move the input with .to('cpu'), or the model with .to('meta')"


def test_an_unknown_target() -> None:
    error = refused(TargetError, MODEL, X, target="npu")
    assert error.message == "unknown target 'npu'"
    assert "cpu" in (error.hint or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_target_that_is_not_there() -> None:
    error = refused(TargetError, MODEL, X, target="cuda:1")
    assert "needs CUDA device 1; PyTorch sees 0 here" in error.message


def test_an_unknown_executor() -> None:
    error = refused(TargetError, MODEL, X, executors=("onnx",))
    assert error.message == "unknown executor 'onnx'"
    assert "ort" in (error.hint or "")


def test_an_unknown_pass() -> None:
    error = refused(PassError, MODEL, X, disable=("fuse_linaer",))
    assert error.message == "there is no pass 'fuse_linaer'"
    assert "did you mean fuse_linear" in (error.hint or "")


def test_a_model_in_training_mode() -> None:
    error = refused(CaptureError, MLP(), X)
    assert error.message.startswith("MLP is in training mode")
    assert "model.eval()" in (error.hint or "")


def test_an_unknown_dynamic_input() -> None:
    error = refused(InputError, MODEL, X, dynamic={"input": {0: "batch"}})
    assert "'input', which is not among the example inputs" in error.message
    assert error.where == "dynamic={'input': {0: 'batch'}}"
    assert error.hint == "name one of: x"


def test_an_unknown_answer_to_a_mismatch() -> None:
    error = refused(InputError, MODEL, X, on_mismatch="ignore")
    assert "on_mismatch" in error.message
    assert "fallback" in (error.hint or "")


def test_a_model_that_is_none() -> None:
    error = refused(InputError, "bert-base-uncased", X)  # type: ignore[arg-type]
    assert error.message == "model is a str: neither an nn.Module nor an ExportedProgram"
    assert "build the model first" in (error.hint or "")


def test_an_unknown_effort() -> None:
    error = refused(InputError, MODEL, X, effort="lots")
    assert "effort" in error.message
    assert "measured" in (error.hint or "")
