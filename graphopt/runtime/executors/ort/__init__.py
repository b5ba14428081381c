"""The ``ort`` executor: a region as a session of ONNX Runtime, on one of its providers.

Weights are not copied into a session where it can read the model's own memory, inputs and outputs are bound
by their addresses, and on a GPU calls follow the caller's stream and the host waits for nothing.
"""

from __future__ import annotations

from graphopt.runtime.executors.ort.executor import Ort, inexpressible
from graphopt.runtime.executors.ort.program import OrtProgram

__all__ = ["Ort", "OrtProgram", "inexpressible"]
