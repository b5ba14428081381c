"""A check that passed is not run again while nothing has changed that it could depend on.

A cache that hides a change is worse than none, so the key holds the contents of everything, and no dates: the
captured graph with every weight and input, the source of every module that was imported from outside of
Python's own library and the installed packages, graphopt's sources and those of the passes, the versions of
all installed packages, the processor, the configuration, the budgets and the lock's entry. Only what passed
is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from graphopt.compiler.pass_ import Pass
from graphopt.errors import OutputError
from graphopt.gate import facts, probe
from graphopt.ir import provenance
from graphopt.ir.graph import Graph
from graphopt.observe.files import write_text
from graphopt.observe.summary import jsonable

FOLDER = Path(".graphopt") / "check"
_KEPT = 100  # results; older ones go
_ENVIRONMENT = ("GRAPHOPT", "OMP_", "KMP_", "MKL_", "GOMP_", "TORCH", "PYTORCH", "ORT_", "CUDA", "TRITON")


def key(
    captured: Graph,
    inputs: Sequence[torch.Tensor],
    passes: Sequence[Pass],
    host: Mapping[str, Any],
    *settings: Mapping[str, Any],
) -> str:
    """What a check of a model depends on, as one digest.

    Args:
        captured: the graph as captured.
        inputs: its example inputs.
        passes: what rewrites it.
        host: what its forward asks of the host.
        settings: configuration, budgets, entry of the lock.
    """
    parts = {
        "graph": _graph(captured),
        "weights": probe.weights(captured),
        "inputs": probe.inputs(captured, inputs),
        "passes": {rule.name: facts.pass_digest(rule) for rule in passes},
        "host": host,
        "code": _code(),
        "packages": sorted(f"{found.name}=={found.version}" for found in distributions()),
        "python": sys.version,
        "machine": facts.machine(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)},
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(jsonable(parts), sort_keys=True).encode()).hexdigest()


def _graph(graph: Graph) -> list[str]:
    """Every node with its arguments, value and place; the specs of inputs and outputs."""
    rows = [
        f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {node.meta.get('val')} "
        f"{provenance.of(node).source}"
        for node in graph.nodes
    ]
    return [
        *rows,
        str(graph.in_spec),
        str(graph.out_spec),
        *(f"{spec.path} {spec.dims} {spec.constant}" for spec in graph.inputs),
    ]


def _code() -> dict[str, str]:
    """The digest of every imported file that is graphopt's or the user's own."""
    paths = sysconfig.get_paths()
    installed = tuple(
        str(Path(paths[name]).resolve()) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not Path(file).is_file():
            continue
        ours = name.partition(".")[0] == "graphopt"
        if ours or not str(Path(file).resolve()).startswith(installed):
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def load(folder: Path, found: str) -> dict[str, Any] | None:
    """What was kept under a key; None when there is nothing that can be read."""
    try:
        kept: dict[str, Any] = json.loads((folder / f"{found}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and kept.get("key") == found else None


def keep(folder: Path, found: str, value: Mapping[str, Any]) -> str:
    """Keep a value under a key; returns why that failed, which is no reason for the check to fail, or ""."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        write_text(folder / f"{found}.json", json.dumps(jsonable({**value, "key": found}), allow_nan=False))
        for old in sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_mtime)[_KEPT:]:
            old.unlink(missing_ok=True)
    except (OSError, OutputError) as error:
        return f"the result was not cached: {error}"
    return ""
