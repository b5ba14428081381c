"""The folder that ``graphopt optimize -o`` writes: complete, or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir

from graphopt.cli._spec import Loaded
from graphopt.errors import OutputError
from graphopt.observe.files import cannot_write, require_folder
from graphopt.optimized_model import OptimizedModel
from graphopt.runtime.plan import Plan, Value

FORMAT, SCHEMA = "graphopt-folder", 1
MANIFEST = "manifest.json"


class Folder:
    """A place for a folder, looked at before the work begins.

    Args:
        path: where; it must not exist.
        force: it may exist if graphopt wrote it: if its manifest says so and it holds nothing else.

    Raises:
        OutputError: the place is taken or cannot be written to.
    """

    def __init__(self, path: Path, force: bool) -> None:
        self.path = path.absolute()
        self.force = force
        self._require_free()
        require_folder(self.path.parent)
        if not os.access(self.path.parent, os.W_OK):
            raise cannot_write(self.path, OSError(13, "permission denied"))

    def write(self, fill: Callable[[Path], None]) -> None:
        """Fill a hidden folder beside the place, and rename it into the place as the last act.

        Args:
            fill: writes the files into the folder that it is given.

        Raises:
            OutputError: the files cannot be written, or the place was taken meanwhile.
        """
        try:
            draft = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fill(draft)
            draft.chmod(0o777 & ~_umask())  # mkdtemp's are for the owner only
            self._require_free()
            self._swap(draft)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _swap(self, draft: Path) -> None:
        if not self.path.exists():
            draft.rename(self.path)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".old", dir=self.path.parent))
        self.path.rename(old)  # onto an empty folder, which a rename replaces
        try:
            draft.rename(self.path)
        except BaseException:
            old.rename(self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _require_free(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.force:
            own = " (or replace it with --force)" if not self._foreign() else ""
            raise OutputError(f"{self.path} exists already", hint=f"name another folder{own}")
        if foreign := self._foreign():
            raise OutputError(
                f"{self.path} is not replaced: {foreign}",
                hint="name another folder",
            )

    def _foreign(self) -> str:
        """Why a folder is not graphopt's to replace; "" if it is."""
        if self.path.is_symlink() or not self.path.is_dir():
            return "it is no folder"
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            known = {MANIFEST, *manifest["files"]} if manifest["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if known is None:
            return f"it has no {MANIFEST} of graphopt's"
        strange = sorted(path.name for path in self.path.iterdir() if path.name not in known or path.is_dir())
        return f"it holds {strange[0]}, which graphopt did not write" if strange else ""


def fill(folder: Path, optimized: OptimizedModel, loaded: Loaded, spec: str) -> None:
    """Write report, plan, ONNX models and manifest.

    Args:
        folder: an empty folder.
        optimized: what is written.
        loaded: what it was made from.
        spec: what the user called that.
    """
    report = optimized.report
    report.to_html(folder / "report.html")
    report.to_json(folder / "report.json")
    (folder / "plan.txt").write_text(f"{optimized.plan}\n", encoding="utf-8")
    regions = [_write_region(folder, row, step.program) for row, step in _steps(optimized.plan)]
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "graphopt": version("graphopt"),
        "versions": report.versions,
        "spec": {"given": spec, "kind": loaded.kind, "notes": list(loaded.notes)},
        "model": report.model,
        "executor": report.chosen.name,
        "device": str(optimized.plan.device),
        "inputs": list(optimized.plan.inputs),
        "outputs": [_end(end) for end in optimized.plan.outputs],
        "regions": regions,
        "files": {path.name: _digest(path) for path in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def where_regions_run(plan: Plan) -> list[str]:
    """A line a step: which file it is in, or that it stays in PyTorch."""
    return [
        f"{row['step']}: {row['nodes']} nodes, "
        + (f"ONNX in {row['step']}.onnx" if _onnx(step.program) else f"stays in PyTorch ({row['executor']})")
        for row, step in _steps(plan)
    ]


def in_pytorch(plan: Plan) -> list[str]:
    """The steps that no file holds, each with its executor."""
    rows = (row for row, step in _steps(plan) if _onnx(step.program) is None)
    return [f"{row['step']} ({row['executor']})" for row in rows]


def _steps(plan: Plan) -> list[tuple[dict[str, Any], Any]]:
    return list(zip(plan.rows(), plan.steps, strict=True))


def _onnx(program: Any) -> onnx_ir.Model | None:
    model = getattr(program, "model", None)
    return model if isinstance(model, onnx_ir.Model) else None


def _write_region(folder: Path, row: dict[str, Any], program: Any) -> dict[str, Any]:
    """Write a region if it is ONNX; the model's inputs are ``reads``, its outputs ``writes``, in order."""
    region = {key: row[key] for key in ("step", "executor", "nodes", "reads", "writes")}
    model = _onnx(program)
    if model is None:
        return {**region, "onnx": None}
    name = row["step"]
    onnx_ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.data")
    return {
        **region,
        "onnx": f"{name}.onnx",
        "onnx_inputs": [value.name for value in model.graph.inputs],
        "onnx_outputs": [value.name for value in model.graph.outputs],
        "domains": {domain or "ai.onnx": number for domain, number in model.graph.opset_imports.items()},
    }


def _end(end: Any) -> dict[str, Any]:
    return {"value": end.name} if isinstance(end, Value) else {"literal": repr(end)}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
