"""One file an executor; all of them follow the protocol in ``_protocol.py``."""

from __future__ import annotations

from graphopt.runtime.executors._protocol import Executor, KernelTime, Program
from graphopt.runtime.executors.cuda import Cuda
from graphopt.runtime.executors.eager import Eager
from graphopt.runtime.executors.inductor import Inductor
from graphopt.runtime.executors.onednn import Onednn
from graphopt.runtime.executors.ort import Ort

EXECUTORS: dict[str, Executor] = {
    executor.name: executor for executor in (Ort(), Cuda(), Inductor(), Onednn(), Eager())
}

__all__ = ["EXECUTORS", "Executor", "KernelTime", "Program"]
