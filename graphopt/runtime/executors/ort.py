"""The ``ort`` executor: a region becomes an ONNX Runtime session on the CPU.

Weights are not copied into the session: it reads the model's own memory. Inputs are bound by pointer, and so are
outputs of fixed shape.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import fx

from graphopt.errors import LoweringError
from graphopt.ir.graph import is_getitem, is_symbolic
from graphopt.ir.op import op_of
from graphopt.runtime.executors._protocol import KernelTime
from graphopt.runtime.lower_onnx import has_translation, to_onnx
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target

_SHARED = "shared"  # the "file" of initializers that live in the model's memory
_MIN_SHARED_BYTES = 1024  # smaller ones stay in the graph, where ONNX Runtime's own folding sees them

_KERNEL = "_kernel_time"  # how ONNX Runtime's profile marks a kernel
_PROFILED_RUNS = 4

_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


class OrtProgram:
    """A region as an ONNX Runtime session.

    Args:
        region: the region.
        model: the region in ONNX.
    """

    def __init__(self, region: Region, model: ir.Model) -> None:
        self.model = model
        self._outputs = [(node.meta["val"].dtype, _fixed_shape(node)) for node in region.results]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_profiling = True  # until profile() ends it
        folder = tempfile.mkdtemp(prefix="graphopt-")
        options.profile_file_prefix = os.path.join(folder, "ort")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        proto, self._weights = _share_weights(model)
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        try:
            self._session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise LoweringError(f"ONNX Runtime refuses the region: {str(error).splitlines()[0]}") from error
        self._times: list[KernelTime] | None = None
        self._input_names = [value.name for value in self._session.get_inputs()]
        self._output_names = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the session on CPU tensors; returns fresh tensors."""
        binding = self._session.io_binding()
        kept = []
        for name, tensor in zip(self._input_names, inputs, strict=True):
            tensor = tensor.detach().contiguous()
            kept.append(tensor)
            binding.bind_input(name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        results: list[Any] = []
        for name, (dtype, shape) in zip(self._output_names, self._outputs, strict=True):
            if shape is None:
                results.append(None)
                binding.bind_output(name, "cpu")
            else:
                results.append(torch.empty(shape, dtype=dtype))
                binding.bind_output(name, "cpu", 0, _NUMPY[dtype], list(shape), results[-1].data_ptr())
        self._session.run_with_iobinding(binding)
        if any(result is None for result in results):
            made = binding.get_outputs()
            for index, result in enumerate(results):
                if result is None:
                    results[index] = torch.from_numpy(made[index].numpy())
        return results

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run a few times and read the session's own profile; it is recorded once, and then switched off."""
        for _ in range(_PROFILED_RUNS):
            results = self.run(inputs)
        if self._times is None:
            path = self._session.end_profiling()
            with open(path) as file:
                events = json.load(file)
            os.remove(path)
            self._times = _kernel_times(events, self.model)
        return results, self._times


def _kernel_times(events: Sequence[dict[str, Any]], model: ir.Model) -> list[KernelTime]:
    """Mean time a node over the recorded runs, the first left out: it allocates."""
    ours = {node.name: node.metadata_props.get("graphopt.node", "") for node in model.graph}
    rows: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            op_type = event.get("args", {}).get("op_name", "")
            rows.setdefault(name.removesuffix(_KERNEL), (op_type, []))[1].append(event["dur"] / 1e3)
    return [
        KernelTime(ours.get(name) or name, op_type, sum(times[1:]) / max(len(times) - 1, 1))
        for name, (op_type, times) in rows.items()
    ]


class Ort:
    """Compiles regions for ONNX Runtime's CPU provider."""

    name = "ort"

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why ONNX Runtime cannot take a node: its device, its type, or an op without translation."""
        if target.device.type != "cpu":
            return f"the ort executor runs on the CPU, the target is {target}"
        if is_getitem(node) or is_symbolic(node):
            return None
        for val in _tensors(node):
            if val.dtype not in _NUMPY:
                return f"{val.dtype} cannot be bound"
            if op_of(node.target) is not None and val.dtype == torch.float64:
                return "ONNX Runtime's fused kernels do not take float64"
        if not has_translation(node.target):
            return f"{node.target} has no ONNX translation"
        return None

    def compile(self, region: Region, target: Target) -> OrtProgram:
        """Export the region and open a session on it."""
        return OrtProgram(region, to_onnx(region.graph))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    vals = [node.meta["val"], *(source.meta["val"] for source in node.all_input_nodes)]
    flat = torch.utils._pytree.tree_leaves(vals)
    return [val for val in flat if isinstance(val, torch.Tensor)]


def _fixed_shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = tuple(node.meta["val"].shape)
    return shape if all(isinstance(size, int) for size in shape) else None


def _share_weights(model: ir.Model) -> tuple[bytes, dict[str, Any]]:
    """The model's bytes without its large initializers, and those as values over the tensors' own memory."""
    shared: dict[str, Any] = {}
    originals: list[tuple[ir.Value, Any]] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _MIN_SHARED_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        name = value.name or ""
        shared[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
        originals.append((value, tensor))
        value.const_value = ir.ExternalTensor(
            _SHARED, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
        )
    try:
        proto: bytes = ir.to_proto(model).SerializeToString()
    finally:
        for value, tensor in originals:
            value.const_value = tensor
    return proto, shared
