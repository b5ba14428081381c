"""The ``ort`` executor: which nodes it takes, and what it compiles them to."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.errors import LoweringError, TargetError
from graphopt.ir.graph import is_getitem, is_symbolic
from graphopt.ir.op import op_of
from graphopt.ir.tuning import Tuning, tuned_for
from graphopt.runtime.executors.ort import providers
from graphopt.runtime.executors.ort.binding import CPU_DTYPES, GPU_DTYPES
from graphopt.runtime.executors.ort.cuda import OrtCudaProgram
from graphopt.runtime.executors.ort.program import OrtProgram
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.onnx_translation import has_translation
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target

# Whose fastest nodes a provider is given; the others take the fused ones.
_TUNINGS: dict[str, Tuning] = {
    providers.CPU: "cpu",
    providers.CUDA: "cuda",
    providers.OPENVINO: "openvino",
}


class Ort:
    """Compiles regions for a provider of the installed ONNX Runtime: the device's own, or one asked for."""

    name = "ort"

    def absent(self, target: Target) -> str | None:
        """Why it cannot run on a target at all: the provider is not there, or does not load."""
        try:
            provider = providers.provider_for(target)
        except TargetError as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        if provider.devices:
            return None
        chain = (provider, *provider.followed_by)
        found = (providers.problem(each.name, each.options.get("device_id", "0")) for each in chain)
        return next(filter(None, found), None)

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why ONNX Runtime cannot take a node: the provider, its type, or an op without translation."""
        return self.absent(target) or inexpressible(node, target.device)

    def compile(self, region: Region, target: Target, effort: str) -> OrtProgram | OrtCudaProgram:
        """Export the region and open a session on it.

        Raises:
            LoweringError: the region cannot be exported, or ONNX Runtime refuses it, or a plugin takes no
                node of it.
        """
        provider = providers.provider_for(target)
        with tuned_for(_TUNINGS.get(provider.name, "any")):
            model = to_onnx(region.graph)
        if provider.on_gpu:
            return OrtCudaProgram(region, model, provider, target.device, target.ort)
        program = OrtProgram(region, model, provider, target.ort)
        if provider.devices and not program.describe()["providers"].get(provider.name):
            raise LoweringError(
                f"{provider.name} takes no node of the region: ONNX Runtime runs all of it on the CPU"
            )
        return program


def inexpressible(node: fx.Node, device: torch.device) -> str | None:
    """Why a node cannot be handed over as ONNX: its type, or an op without translation; None when it can."""
    if is_getitem(node) or is_symbolic(node):
        return None
    dtypes = CPU_DTYPES if device.type == "cpu" else GPU_DTYPES
    for val in _tensors(node):
        if val.dtype not in dtypes:
            return f"{val.dtype} cannot be bound"
        if op_of(node.target) is not None and val.dtype == torch.float64:
            return "ONNX Runtime's fused kernels do not take float64"
    if not has_translation(node):
        return f"{node.target} has no ONNX translation"
    return None


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    vals = [node.meta["val"], *(source.meta["val"] for source in node.all_input_nodes)]
    flat = torch.utils._pytree.tree_leaves(vals)
    return [val for val in flat if isinstance(val, torch.Tensor)]
