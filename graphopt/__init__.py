"""graphopt: a compiler-style optimizer of PyTorch computation graphs, every rewrite verified or reverted."""

from __future__ import annotations

from graphopt.errors import (
    CaptureError,
    GraphoptError,
    InputError,
    LoweringError,
    OutputError,
    PassError,
    SpecError,
    TargetError,
)
from graphopt.observe.report import Report
from graphopt.optimize import optimize
from graphopt.optimized_model import OptimizedModel
from graphopt.runtime.target import Target

__all__ = [
    "CaptureError",
    "GraphoptError",
    "InputError",
    "LoweringError",
    "OptimizedModel",
    "OutputError",
    "PassError",
    "Report",
    "SpecError",
    "Target",
    "TargetError",
    "optimize",
]
