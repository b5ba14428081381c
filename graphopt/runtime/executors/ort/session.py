"""Sessions: opened with the user's options on one provider, and gone with all that they left on the disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch

from graphopt.errors import ExecutionError, LoweringError, said
from graphopt.runtime.executors.ort import weights
from graphopt.runtime.executors.ort.binding import bind_inputs, bind_outputs, take_outputs
from graphopt.runtime.executors.ort.placement import Placement, placement_of
from graphopt.runtime.executors.ort.providers import CPU, Provider
from graphopt.runtime.ort_options import OrtOptions

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class Session:
    """A model that is loaded into ONNX Runtime.

    Args:
        model: the region in ONNX.
        provider: what it runs on.
        options: the user's.
        profiled: record what each node takes until ``kernel_events`` is called.

    Attributes:
        placement: where each node runs.
        reads_on_host: a node on the CPU reads an input, which is then copied from a GPU when it is bound.

    Raises:
        LoweringError: ONNX Runtime refuses the model or an option, or it does not run on the provider.
    """

    def __init__(
        self, model: ir.Model, provider: Provider, options: OrtOptions, *, profiled: bool = False
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="graphopt-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        weights.write_without_weights(model, self._folder / "model.onnx")
        share = set() if provider.devices else weights.shareable(model)
        self._open(model, provider, options, share, profiled)
        misplaced = share & self.placement.reads_elsewhere(model, provider.name)
        if misplaced:  # a kernel on another device cannot read them: it would find the hole of the file
            self._open(model, provider, options, share - misplaced, profiled)
        if not profiled:
            self._remove()
        self.reads_on_host = any(info.name == "Cpu" for info in self._session.get_input_memory_infos())
        self._input_names = [value.name for value in self._session.get_inputs()]
        self._output_names = [value.name for value in self._session.get_outputs()]

    def _open(
        self, model: ir.Model, provider: Provider, given: OrtOptions, share: set[str], profiled: bool
    ) -> None:
        options = session_options(provider, given)
        if profiled:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._folder / "ort")
        self._weights = weights.collect(model, share)
        self._weights.hand_over(options)
        try:
            if provider.devices:
                options.add_provider_for_devices(list(provider.devices), dict(provider.options))
            self._session = onnxruntime.InferenceSession(
                str(self._folder / "model.onnx"), options, providers=provider.entries(), enable_fallback=0
            )
        except Exception as error:
            raise LoweringError(f"ONNX Runtime refuses the region: {_first_line(error)}") from error
        if self._session.get_providers()[0] != provider.name:
            raise LoweringError(f"{provider.name} does not load here: ONNX Runtime falls back to the CPU")
        self.placement = placement_of(self._session, model)

    @property
    def provider(self) -> str:
        """The provider that the session runs on; those that it could not have are not named."""
        return str(self._session.get_providers()[0])

    def binding(self) -> Any:
        """A new binding of the session."""
        return self._session.io_binding()

    def bind(
        self,
        binding: Any,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor | None],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Bind a call's tensors; returns those that must live until it has run.

        Raises:
            ExecutionError: ONNX Runtime refuses one.
        """
        try:
            kept = bind_inputs(binding, self._input_names, inputs)
            bind_outputs(binding, self._output_names, outputs, device)
        except Exception as error:
            raise ExecutionError(f"ONNX Runtime cannot bind a tensor: {_first_line(error)}") from error
        return kept

    def run(
        self, binding: Any, outputs: Sequence[torch.Tensor | None], run_options: Any = None
    ) -> list[torch.Tensor]:
        """Run what is bound.

        Returns:
            The outputs; those that were None are ONNX Runtime's own memory.

        Raises:
            ExecutionError: a node fails. Nothing is returned then, though some outputs may be written.
        """
        try:
            self._session.run_with_iobinding(binding, run_options)
        except Exception as error:
            raise ExecutionError(
                f"ONNX Runtime failed in the middle of a run on {self.provider}: {_first_line(error)}"
            ) from error
        return take_outputs(binding, outputs)

    def release_graph(self, identity: int) -> None:
        """Let go of a CUDA graph."""
        self._session.release_captured_graph(identity)

    def end_profiling(self) -> str:
        """What was recorded, as JSON; nothing is recorded any more, and nothing left on the disk."""
        path = Path(self._session.end_profiling())
        text = path.read_text()
        self._remove()
        return text


def session_options(provider: Provider, given: OrtOptions) -> Any:
    """The options of a session, without those of its provider.

    Raises:
        LoweringError: ONNX Runtime refuses an entry.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.intra_op_threads or torch.get_num_threads()
    options.inter_op_num_threads = given.inter_op_threads
    if given.inter_op_threads > 1:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    level = "none" if provider.devices else given.graph_optimization  # a plugin wants the nodes as they are
    options.graph_optimization_level = _LEVELS[level]
    options.enable_cpu_mem_arena = given.arena
    options.log_severity_level = 3
    config = {
        # Threads that wait for the next call by spinning take the cores from PyTorch's in between: on a busy
        # machine of two cores, the eager call after one here took 100 ms instead of 0.25.
        "session.force_spinning_stop": "1",
        "session.record_ep_graph_assignment_info": "0" if provider.name == CPU else "1",
        **given.session_config,
    }
    for key, value in config.items():
        try:
            options.add_session_config_entry(key, str(value))
        except Exception as error:
            raise LoweringError(f"ONNX Runtime refuses {key}={value!r}: {_first_line(error)}") from error
    return options


def _first_line(error: Exception) -> str:
    return (str(error) or said(error)).splitlines()[0]


__all__ = ["Placement", "Session", "session_options"]
