"""The public face of ``graphopt``: what ``graphopt.<name>`` gives, loaded with all of it at the first use."""

from __future__ import annotations

from graphopt.compiler.pass_ import custom_pass
from graphopt.errors import (
    CaptureError,
    DeadlineError,
    ExecutionError,
    GraphoptError,
    InputError,
    LoweringError,
    OutputError,
    PassError,
    QueueFullError,
    SessionClosedError,
    SessionError,
    SpecError,
    TargetError,
)
from graphopt.explain import explain
from graphopt.observe.explanation import Explanation
from graphopt.observe.report import Report
from graphopt.optimize import optimize
from graphopt.optimized_model import OptimizedModel
from graphopt.runtime.ort_options import OrtOptions
from graphopt.runtime.target import Target

__all__ = [
    "CaptureError",
    "DeadlineError",
    "ExecutionError",
    "Explanation",
    "GraphoptError",
    "InputError",
    "LoweringError",
    "OptimizedModel",
    "OrtOptions",
    "OutputError",
    "PassError",
    "QueueFullError",
    "Report",
    "SessionClosedError",
    "SessionError",
    "SpecError",
    "Target",
    "TargetError",
    "custom_pass",
    "explain",
    "optimize",
]
