"""What OpenVINO reads, tried first in a process of its own."""

from __future__ import annotations

import functools
import importlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import LoweringError, said
from graphopt.runtime.executors.ort.weights import Held, collect, large, without_weights
from graphopt.runtime.onnx_translation import quiet

# The "file" of what lies in the process's memory: ONNX Runtime's provider calls it so to OpenVINO's reader.
_MEMORY = "*/_ORT_MEM_ADDR_/*"


@functools.cache
def core() -> Any:
    """The one through which all of OpenVINO is reached."""
    return importlib.import_module("openvino").Core()


def read(model: ir.Model) -> tuple[Any, Mapping[str, Held]]:
    """A model in OpenVINO's own form, and the weights, which must live as long as what is compiled of it."""
    weights = collect(model, {name for name, _, _ in large(model)}).shared
    text = without_weights(model, lambda name: (_MEMORY, weights[name].value.data_ptr()))
    return core().read_model(text), weights


_TRIAL = """
import json, sys, openvino
core = openvino.Core()
model = core.compile_model(core.read_model(sys.argv[1]), "CPU", json.loads(sys.argv[2]))
if not any(port.partial_shape.is_dynamic for port in model.inputs):
    request = model.create_infer_request()
    for place in range(len(model.inputs)):
        request.get_input_tensor(place).data[...] = 0
    request.infer()
"""
_PATIENCE = 600  # seconds


def try_elsewhere(model: ir.Model, options: dict[str, Any]) -> None:
    """Compile a model, and run it once, in a process of its own, which OpenVINO may take down.

    OpenVINO 2026.4 does with some chains of small products in float32.

    Raises:
        LoweringError: it was taken down, or did not end, or could not be made.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            place = Path(folder) / "model.onnx"
            with quiet():
                ir.save(model, place, external_data="weights")
            command = [sys.executable, "-c", _TRIAL, str(place), json.dumps(options)]
            done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoweringError(f"OpenVINO cannot be tried in a process of its own: {said(error)}") from error
    if done.returncode < 0:  # what it says on its own it says again in this process
        how = signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
        raise LoweringError(f"OpenVINO took down the process that tried the region first: {how}")


def last_line(error: Exception) -> str:
    """What is wrong: the lines above name OpenVINO's own files."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, reversed(lines)), said(error))
