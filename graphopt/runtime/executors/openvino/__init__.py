"""The ``openvino`` executor: a region compiled by OpenVINO, on the CPU.

Where OpenVINO itself is installed it reads the region as ONNX and runs it, on any processor that it knows.
Where only its plugin for ONNX Runtime is installed, the region is a session of that, on Intel's processors.
"""

from __future__ import annotations

from graphopt.runtime.executors.openvino.executor import OpenVino, is_installed
from graphopt.runtime.executors.openvino.program import OpenVinoProgram, Precision, Settings

__all__ = ["OpenVino", "OpenVinoProgram", "Precision", "Settings", "is_installed"]
