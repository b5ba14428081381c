"""The model as it is served: what is written of it, and what a new process needs to open and run that."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch

from graphopt.errors import LoweringError
from graphopt.observe.memory import unique_bytes
from graphopt.runtime.plan import Plan

_SECONDS = 300.0
_SCRIPT = """
import json, sys, time
import numpy as np, onnxruntime
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
try:
    before = peak()
except OSError:
    before = None
took, kept = 0.0, []
for name in sys.argv[2:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(sys.argv[1])
    options.log_severity_level = 3
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(name + ".onnx", options, providers=["CPUExecutionProvider"])
    took += time.perf_counter() - start
    with np.load(name + ".npz", allow_pickle=False) as values:
        given = [values[f"arr_{i}"] for i in range(len(values.files))]
    kept.append((session, session.run(None, dict(zip([v.name for v in session.get_inputs()], given)))))
print(json.dumps({"load_ms": 1e3 * took, "peak_bytes": None if before is None else peak() - before}))
"""


def served(plan: Plan, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Write a plan's ONNX models, and open and run them once in a process of ONNX Runtime alone.

    Args:
        plan: the plan.
        inputs: example inputs: flat tensors in the plan's order.

    Returns:
        ``artifact_bytes`` (files of the ONNX regions, and the weights of all others), ``load_ms`` (until all
        sessions are open) and ``peak_bytes`` (of resident memory, beyond that of the process without a
        model); the latter two None where a part of the plan needs PyTorch, or the system does not tell.

    Raises:
        LoweringError: what was written cannot be opened, or does not run.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as place:
        folder, total, names = Path(place), 0, []
        values: dict[str, Any] = dict(zip(plan.inputs, inputs, strict=True)) | plan.constants
        for step in plan.steps:
            reads = [values[name] for name in step.region.reads]
            values.update(zip(step.region.writes, step.program.run(reads), strict=True))
            model = getattr(step.program, "model", None)
            if not isinstance(model, onnx_ir.Model):
                total += unique_bytes(step.region.graph.constants.values())
                continue
            name = folder / step.region.name
            onnx_ir.save(model, f"{name}.onnx", external_data=f"{name.name}.data")
            total += sum(path.stat().st_size for path in folder.glob(f"{name.name}.*"))
            np.savez(f"{name}.npz", *[value.detach().cpu().numpy() for value in reads])
            names.append(str(name))
        alone = len(names) == len(plan.steps)
        return {"artifact_bytes": total, **(_opened(names) if alone and names else _UNKNOWN)}


_UNKNOWN: dict[str, Any] = {"load_ms": None, "peak_bytes": None}


def _opened(names: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-c", _SCRIPT, str(torch.get_num_threads()), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise LoweringError(f"the written model does not run in a process of its own: {said[0]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "load_ms": round(found["load_ms"], 1)}
