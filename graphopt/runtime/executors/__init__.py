"""One file an executor, or one folder; all of them follow the protocol in ``_protocol.py``."""

from __future__ import annotations

from graphopt.runtime.executors._protocol import Executor, KernelTime, Program
from graphopt.runtime.executors.cuda import Cuda
from graphopt.runtime.executors.eager import Eager
from graphopt.runtime.executors.inductor import Inductor
from graphopt.runtime.executors.onednn import Onednn
from graphopt.runtime.executors.openvino import OpenVino
from graphopt.runtime.executors.openvino import is_installed as openvino_is_installed
from graphopt.runtime.executors.ort import Ort
from graphopt.runtime.target import Target

EXECUTORS: dict[str, Executor] = {
    executor.name: executor for executor in (Ort(), OpenVino(), Cuda(), Inductor(), Onednn(), Eager())
}


def absent(executor: Executor, target: Target) -> str | None:
    """Why an executor cannot run on a target at all; None when it can, or when only its nodes will tell."""
    return executor.absent(target) if isinstance(executor, Ort | OpenVino) else None


def besides(target: Target) -> str | None:
    """What is measured beside a device's own executor: OpenVINO where it is installed, ``ort`` on a GPU."""
    if target.device.type != "cpu":
        return "ort"
    return "openvino" if openvino_is_installed() else None


def hinted(precision: str, target: Target) -> Executor | None:
    """What computes an exact graph in a precision by itself, on being told so; None where nothing does."""
    told = precision == "bf16" and target.device.type == "cpu" and openvino_is_installed()
    return OpenVino("bf16") if told else None


def of_codes(target: Target) -> list[OpenVino]:
    """What multiplies codes beside PyTorch and ONNX Runtime: OpenVINO, all else in float32 or in bfloat16."""
    if target.device.type != "cpu" or not openvino_is_installed():
        return []
    return [OpenVino("f32"), OpenVino("bf16")]


__all__ = ["EXECUTORS", "Executor", "KernelTime", "Program", "absent", "besides", "hinted", "of_codes"]
