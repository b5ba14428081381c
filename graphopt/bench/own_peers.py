"""graphopt itself, held to ONNX Runtime: beside what the measurement chose, what one executor is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import graphopt
from graphopt.bench.onnx_peers import cuda_graph_mode, exported_run
from graphopt.bench.peer import Mode, Problem, Run, eager
from graphopt.errors import LoweringError
from graphopt.optimized_model import OptimizedModel


def graphopt_ort_modes(problem: Problem) -> Sequence[Mode]:
    """Run by graphopt, and exported and run by ONNX Runtime alone, on a GPU also as its CUDA graph.

    The export is bound and run exactly as the peer ``onnxruntime`` runs PyTorch's own.
    """
    modes = [Mode("", _run_by_graphopt), Mode("export", lambda p: exported_run(p, _export(p)))]
    if problem.device.type == "cuda":
        modes.append(cuda_graph_mode("export", _export))
    return modes


def _optimized(problem: Problem) -> OptimizedModel:
    return graphopt.optimize(problem.model, problem.args, problem.kwargs, executors=("ort",))


def _run_by_graphopt(problem: Problem) -> Run:
    """Every step on ONNX Runtime.

    Raises:
        LoweringError: another executor has a part of the model.
    """
    optimized = _optimized(problem)
    others = {str(row["executor"]) for row in optimized.plan.rows()} - {"ort"}
    if others:
        raise LoweringError(f"a part of the model runs on {', '.join(sorted(others))}")
    return eager(optimized, problem.args, problem.kwargs)


def _export(problem: Problem) -> Path:
    """The export as a file, made once for all who run it."""
    path = problem.folder / "graphopt.onnx"
    if not path.exists():
        _optimized(problem).export_onnx(path)
    return path
