"""One case of ``graphopt bench`` in a process of its own: a job comes in as JSON, lines of JSON go out.

A line is ``{"doing": ..., "done": ...}`` on the way, and last ``{"row": ...}`` or ``{"failed": ...}``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from graphopt.bench.case import run_case
from graphopt.bench.setting import Case, Setting
from graphopt.cli import _folder, _spec
from graphopt.cli._errors import FAULT, INTERRUPTED, exit_code
from graphopt.errors import GraphoptError, said
from graphopt.optimized_model import OptimizedModel

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Measure the case that stdin describes."""
    said_to = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what models and libraries print is no answer

    def say(message: dict[str, Any]) -> None:
        said_to.write(json.dumps(message, allow_nan=False) + "\n")

    job = json.load(sys.stdin)
    try:
        say({"row": _measured(job, say)})
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except GraphoptError as error:
        traceback.print_exc()
        failed = {"message": error.message, "where": error.where, "hint": error.hint}
        say({"failed": {**failed, "code": exit_code(error)}})
    except Exception as error:
        traceback.print_exc()
        say({"failed": {"message": said(error).strip().partition("\n")[0], "code": FAULT}})


def _measured(job: dict[str, Any], say: Say) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    case = Case(**job["case"])
    setting = Setting(**{**job["setting"], "against": tuple(job["setting"]["against"])})
    say({"doing": "load", "done": 0.0})
    torch.manual_seed(case.seed)
    loaded = _spec.load(case.spec, target=case.device, sizes=case.sizes)
    return run_case(
        case,
        loaded.model,
        loaded.args,
        loaded.kwargs,
        setting,
        tell=lambda doing, done: say({"doing": doing, "done": done}),
        crashed=job["crashed"],
        artifact=lambda optimized: _artifact(optimized, loaded, case.spec),
    )


def _artifact(optimized: OptimizedModel, loaded: _spec.Loaded, spec: str) -> dict[str, Any]:
    """The size of what ``graphopt optimize -o`` writes, and how long that takes to load.

    Only a plan that is ONNX throughout can be loaded from there; of any other, why there is no time.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as scratch:
        place = Path(scratch) / "artifact"
        try:
            _folder.Folder(place, force=False).write(
                lambda draft: _folder.fill(draft, optimized, loaded, spec)
            )
        except GraphoptError as error:
            return {"artifact_failed": error.message}
        found: dict[str, Any] = {"artifact_bytes": sum(path.stat().st_size for path in place.iterdir())}
        if left := _folder.in_pytorch(optimized.plan):
            more = f" and {len(left) - 1} more steps" if len(left) > 1 else ""
            found["load_left_out"] = f"{left[0]}{more} of the plan run in PyTorch, from no file"
            return found
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        start = time.perf_counter()
        for path in sorted(place.glob("*.onnx")):
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found["load_s"] = round(time.perf_counter() - start, 3)
        return found


if __name__ == "__main__":
    main()
