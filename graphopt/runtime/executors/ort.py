"""The ``ort`` executor: a region becomes an ONNX Runtime session on the CPU.

Weights are not copied into the session: it reads the model's own memory. Inputs are bound by pointer, and so
are outputs of fixed shape.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import fx

from graphopt.errors import LoweringError
from graphopt.ir.graph import is_getitem, is_symbolic
from graphopt.ir.op import op_of
from graphopt.ir.tuning import tuned_for
from graphopt.runtime.executors._protocol import KernelTime, Silent
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.onnx_translation import has_translation
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target

_SHARED = "shared"  # the "file" of initializers that live in the model's memory
_MIN_SHARED_BYTES = 1024  # smaller ones stay in the graph, where ONNX Runtime's own folding sees them

_KERNEL = "_kernel_time"  # how ONNX Runtime's profile marks a kernel
_PROFILED_RUNS = 3

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


class Held(NamedTuple):
    """A weight in the model's own memory: the array, which must outlive the OrtValue that points into it."""

    array: np.ndarray[Any, Any]
    value: Any


class OrtProgram(Silent):
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
        # Threads that wait for the next call by spinning take the cores from PyTorch's in between: on a busy
        # machine of two cores, the eager call after one here took 100 ms instead of 0.25.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_profiling = True  # of the first runs
        folder = Path(tempfile.mkdtemp(prefix="graphopt-"))
        options.profile_file_prefix = str(folder / "ort")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._shared, copied = _write_without_weights(model, folder / "model.onnx")
        for name, held in self._shared.items():
            options.add_initializer(name, held.value)
        options.add_external_initializers(list(copied), [held.value for held in copied.values()])
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise LoweringError(f"ONNX Runtime refuses the region: {str(error).splitlines()[0]}") from error
        self._times: list[KernelTime] | None = None
        self._profiled, self._recording = 0, threading.Lock()
        self._input_names = [value.name for value in self._session.get_inputs()]
        self._output_names = [value.name for value in self._session.get_outputs()]

    @property
    def provider(self) -> str:
        """The provider that the session runs on; those that it could not have are not named."""
        return str(self._session.get_providers()[0])

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the session on CPU tensors; returns fresh tensors."""
        binding = self._session.io_binding()
        kept = []
        for name, tensor in zip(self._input_names, inputs, strict=True):
            tensor = tensor.detach().contiguous()
            kept.append(tensor)
            binding.bind_input(name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), _address(tensor))
        results: list[Any] = []
        for name, (dtype, shape) in zip(self._output_names, self._outputs, strict=True):
            if shape is None:
                results.append(None)
                binding.bind_output(name, "cpu")
            else:
                results.append(torch.empty(shape, dtype=dtype))
                binding.bind_output(name, "cpu", 0, _NUMPY[dtype], list(shape), _address(results[-1]))
        self._session.run_with_iobinding(binding)
        if self._times is None:
            self._record()
        if any(result is None for result in results):
            made = binding.get_outputs()
            for index, result in enumerate(results):
                if result is None:
                    results[index] = torch.from_numpy(made[index].numpy())
        return results

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run, and tell what the session's own profile of its first runs says."""
        results = self.run(inputs)
        while self._times is None:
            results = self.run(inputs)
        return results, self._times

    def _record(self) -> None:
        """Read the session's profile after its first runs, and switch profiling off for all others."""
        with self._recording:
            self._profiled += 1
            if self._profiled == _PROFILED_RUNS:
                path = Path(self._session.end_profiling())
                self._times = _kernel_times(json.loads(path.read_text()), self.model)
                path.unlink()


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's values lie; an empty one lies nowhere, and ONNX Runtime wants an address."""
    return tensor.data_ptr() or _NOWHERE.data_ptr()


_NOWHERE = torch.zeros(1)


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
        if not has_translation(node):
            return f"{node.target} has no ONNX translation"
        return None

    def compile(self, region: Region, target: Target, effort: str) -> OrtProgram:
        """Export the region and open a session on it."""
        with tuned_for("cpu"):
            model = to_onnx(region.graph)
        return OrtProgram(region, model)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    vals = [node.meta["val"], *(source.meta["val"] for source in node.all_input_nodes)]
    flat = torch.utils._pytree.tree_leaves(vals)
    return [val for val in flat if isinstance(val, torch.Tensor)]


def _fixed_shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = tuple(node.meta["val"].shape)
    return shape if all(isinstance(size, int) for size in shape) else None


def _write_without_weights(model: ir.Model, path: Path) -> tuple[dict[str, Held], dict[str, Held]]:
    """Write a model without its large initializers, which stay in the tensors' own memory.

    ONNX Runtime copies what ``add_external_initializers`` hands it (440 MB for BERT-base) and takes what
    ``add_initializer`` hands it as it is. For the latter it insists that the file which the model names
    exists: that file is one long hole, which its constant folding would read as zeros. So only weights that
    nothing but a kernel reads are handed over that way.

    Returns:
        By name of initializer: those to share, which the session reads as long as it lives, and those to
        copy.
    """
    shared: dict[str, Held] = {}
    copied: dict[str, Held] = {}
    originals: list[tuple[ir.Value, Any]] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _MIN_SHARED_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        array = np.ascontiguousarray(tensor.numpy())
        held = Held(array, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        (shared if _only_kernels_read(value) else copied)[value.name or ""] = held
        originals.append((value, tensor))
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor(
            _SHARED, 0, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or ""
        )
    try:
        path.write_bytes(ir.to_proto(model).SerializeToString())
    finally:
        for value, tensor in originals:
            value.const_value = tensor
    with (path.parent / _SHARED).open("wb") as hole:
        hole.truncate(max((tensor.nbytes for _, tensor in originals), default=0))
    return shared, copied


def _only_kernels_read(weight: ir.Value) -> bool:
    """True for the matrix of a product and the table of a lookup whose other operand the inputs decide."""
    places = {"Gemm": (1, 0), "Gather": (0, 1)}  # where the weight stands, and where the other operand
    for node, index in weight.uses():
        at, other = places.get(node.op_type, (-1, -1))
        if index != at or not _depends_on_inputs(node.inputs[other]):
            return False
    return True


def _depends_on_inputs(value: ir.Value | None) -> bool:
    """True when a value is a graph input, or is computed from one."""
    work, seen = [value], set()
    while work:
        current = work.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if current.is_graph_input() and current.const_value is None:
            return True
        producer = current.producer()
        work.extend(producer.inputs if producer is not None else ())
    return False
