"""The executors ``ort`` and ``openvino``: which nodes they take, and what they compile them to."""

from __future__ import annotations

from typing import get_args

import torch
from torch import fx

from graphopt.errors import InputError, LoweringError, TargetError
from graphopt.ir.graph import is_getitem, is_symbolic
from graphopt.ir.op import op_of
from graphopt.ir.tuning import tuned_for
from graphopt.runtime.executors.ort import providers
from graphopt.runtime.executors.ort.binding import CPU_DTYPES, GPU_DTYPES
from graphopt.runtime.executors.ort.cuda import OrtCudaProgram
from graphopt.runtime.executors.ort.program import OrtProgram
from graphopt.runtime.executors.ort.providers import Precision, Provider
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.onnx_translation import has_translation
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target


class Ort:
    """Compiles regions for a provider of the installed ONNX Runtime: the device's own, or one asked for."""

    name = "ort"

    def absent(self, target: Target) -> str | None:
        """Why it cannot run on a target at all: the provider is not there, or does not load."""
        try:
            provider = self._provider(target)
        except TargetError as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        if provider.devices:
            return None
        chain = (provider, *provider.followed_by)
        found = (providers.problem(each.name, each.options.get("device_id", "0")) for each in chain)
        return next(filter(None, found), None)

    def _provider(self, target: Target) -> Provider:
        return providers.provider_for(target)

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why ONNX Runtime cannot take a node: the provider, its type, or an op without translation."""
        reason = self.absent(target)
        if reason is not None:
            return reason
        if is_getitem(node) or is_symbolic(node):
            return None
        dtypes = CPU_DTYPES if target.device.type == "cpu" else GPU_DTYPES
        for val in _tensors(node):
            if val.dtype not in dtypes:
                return f"{val.dtype} cannot be bound"
            if op_of(node.target) is not None and val.dtype == torch.float64:
                return "ONNX Runtime's fused kernels do not take float64"
        if not has_translation(node):
            return f"{node.target} has no ONNX translation"
        return None

    def compile(self, region: Region, target: Target, effort: str) -> OrtProgram | OrtCudaProgram:
        """Export the region and open a session on it.

        Raises:
            LoweringError: the region cannot be exported, or ONNX Runtime refuses it.
        """
        provider = self._provider(target)
        with tuned_for("cpu" if provider.name == providers.CPU else "any"):
            model = to_onnx(region.graph)
        if provider.on_gpu:
            return OrtCudaProgram(region, model, provider, target.device, target.ort)
        return OrtProgram(region, model, provider, target.ort)


class OpenVino(Ort):
    """Compiles regions for OpenVINO on the CPU, a plugin of ONNX Runtime that is installed beside it.

    Args:
        precision: that it computes in. "f32" is asked for, because OpenVINO takes bf16 by itself where the
            processor has it; the check against float64 sees whether it was given.

    Raises:
        InputError: the precision is unknown.
    """

    name = "openvino"

    def __init__(self, precision: Precision = "f32") -> None:
        if precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise InputError(f"OpenVINO's precision {precision!r} is unknown", hint=f"one of: {known}")
        self.precision = precision

    def _provider(self, target: Target) -> Provider:
        if target.device.type != "cpu":
            raise TargetError(f"OpenVINO runs on the CPU, the target is {target}")
        return providers.openvino(self.precision, providers.torch_threads(target))

    def compile(self, region: Region, target: Target, effort: str) -> OrtProgram | OrtCudaProgram:
        """Export the region and open a session on it.

        Raises:
            LoweringError: the region cannot be exported, or ONNX Runtime refuses it, or OpenVINO takes no
                node of it.
        """
        program = super().compile(region, target, effort)
        if not program.describe()["providers"].get(providers.OPENVINO):
            raise LoweringError(
                "OpenVINO takes no node of the region: ONNX Runtime runs all of it on the CPU"
            )
        return program


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    vals = [node.meta["val"], *(source.meta["val"] for source in node.all_input_nodes)]
    flat = torch.utils._pytree.tree_leaves(vals)
    return [val for val in flat if isinstance(val, torch.Tensor)]
