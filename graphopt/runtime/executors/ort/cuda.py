"""A region as a session of ONNX Runtime on a GPU, as ONNX Runtime's own CUDA graphs where shapes come again.

The session runs on a stream of its own, because CUDA captures no graph on the default stream and because
ONNX Runtime is told its stream once, while callers come on any. That stream waits for the caller's before a
call and the caller's for it after: the device waits, the host does not.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt.errors import LoweringError
from graphopt.runtime.buckets import Buckets
from graphopt.runtime.executors._protocol import KernelTime, Note
from graphopt.runtime.executors.ort.program import described, fallback_notes, fixed_shape
from graphopt.runtime.executors.ort.providers import CUDA, Provider
from graphopt.runtime.executors.ort.session import Session
from graphopt.runtime.ort_options import OrtOptions
from graphopt.runtime.region import Region

_GRAPHS = 8  # shapes that have a graph
_NO_GRAPH = -1  # the identity that ONNX Runtime neither captures nor replays
_TIMED_RUNS = 5


class Captured:
    """What a CUDA graph of ONNX Runtime reads and writes: memory that stays where it is.

    Args:
        identity: that ONNX Runtime knows the graph by.
        inputs: of the shapes that it is for; their values are not kept.
        outputs: likewise.
    """

    def __init__(
        self, identity: int, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        self.identity = identity
        self.inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        self.outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs]
        self.options = run_options(identity)
        self.binding: Any = None


def run_options(identity: int | None) -> Any:
    """Options of a run that the host does not wait for.

    Args:
        identity: of the graph to capture or to replay; None for a session without graphs.
    """
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if identity is not None:
        options.add_run_config_entry("gpu_graph_id", str(identity))
    return options


class OrtCudaProgram:
    """A region as an ONNX Runtime session on a GPU.

    The first shape is captured at once, any other when it comes a second time, as by the ``cuda`` executor.
    ONNX Runtime keeps a graph for the thread that captured it: another thread's first call captures its own,
    on the same memory. Calls run one after the other. While a graph is captured no other thread may allocate
    memory of the GPU: ONNX Runtime captures in CUDA's global mode.

    Args:
        region: the region.
        model: the region in ONNX.
        provider: what it runs on.
        device: that its tensors are on.
        options: the user's.

    Attributes:
        failure: why there are no graphs, in words; None when there are.

    Raises:
        LoweringError: ONNX Runtime refuses the region.
    """

    def __init__(
        self, region: Region, model: ir.Model, provider: Provider, device: torch.device, options: OrtOptions
    ) -> None:
        self.model = model
        self.failure: str | None = None
        self._region = region
        self._device = device
        self._results = region.results
        self._stream = torch.cuda.Stream(device)
        self._session = self._opened(provider, options)
        self._fallbacks = self._session.placement.fallbacks(model, provider)
        self._plain = run_options(_NO_GRAPH if self.failure is None else None)
        self._buckets: Buckets[Captured] = Buckets(_GRAPHS)
        self._identities = itertools.count(1)
        self._lock = threading.Lock()

    def _opened(self, provider: Provider, options: OrtOptions) -> Session:
        """A session that captures graphs, or, when it cannot be had, one that does not."""
        provider = provider.given(user_compute_stream=str(self._stream.cuda_stream))
        self.failure = _never_captured(provider, self._region.graph.calls)
        if self.failure is None:
            try:
                session = Session(self.model, provider.given(enable_cuda_graph="1"), options)
            except LoweringError as error:
                self.failure = error.message
            else:
                if not session.reads_on_host:
                    return session
                self.failure = "a node on the CPU reads an input"
        return Session(self.model, provider, options)

    @property
    def provider(self) -> str:
        """The provider that the session runs on."""
        return self._session.provider

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run after what the current stream has been given; returns fresh tensors.

        Raises:
            ExecutionError: ONNX Runtime fails.
        """
        key = tuple(tensor.shape for tensor in inputs)
        with self._lock, torch.no_grad(), torch.cuda.device(self._device):
            caller = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(caller)
            try:
                captured = self._buckets.find(key)
                if captured is not None:
                    return self._replay(captured, inputs)
                results = self._launch(inputs)
                if self.failure is None and (self._buckets.earns(key) or not len(self._buckets)):
                    self._capture(key, inputs, results)
                return results
            finally:
                caller.wait_stream(self._stream)

    def _launch(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run kernel by kernel."""
        if self._session.reads_on_host:  # it is copied when it is bound, whatever is still to be computed
            self._stream.synchronize()
        shapes = [fixed_shape(node) for node in self._results]
        outputs = [
            None if shape is None else torch.empty(shape, dtype=node.meta["val"].dtype, device=self._device)
            for shape, node in zip(shapes, self._results, strict=True)
        ]
        binding = self._session.binding()
        kept = self._session.bind(binding, inputs, outputs, self._device)
        made = self._session.run(binding, outputs, self._plain)
        del kept
        # What ONNX Runtime allocated goes back to its arena when the tensor goes, whoever still reads it on
        # another stream: such outputs are copied into PyTorch's memory on the session's own stream.
        fresh = [
            torch.empty_like(value) if given is None else value
            for given, value in zip(outputs, made, strict=True)
        ]
        with torch.cuda.stream(self._stream):
            for given, value, result in zip(outputs, made, fresh, strict=True):
                if given is None:
                    result.copy_(value, non_blocking=True)
        return fresh

    def _capture(
        self, key: tuple[torch.Size, ...], inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
    ) -> None:
        """Give a shape its memory; its graph is captured by the run that comes next."""
        old = self._buckets.room()
        if old is not None:
            torch.cuda.synchronize(self._device)
            self._session.release_graph(old.identity)
        captured = Captured(next(self._identities), inputs, results)
        captured.binding = self._session.binding()
        self._session.bind(captured.binding, captured.inputs, captured.outputs, self._device)
        self._buckets.add(key, captured)

    def _replay(self, captured: Captured, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy the inputs in, run the graph, copy the outputs out, all on the session's stream."""
        results = [torch.empty_like(value) for value in captured.outputs]
        with torch.cuda.stream(self._stream):
            _copy(inputs, captured.inputs)
            self._session.run(captured.binding, captured.outputs, captured.options)
            _copy(captured.outputs, results)
        return results

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run, and time the region as a whole.

        What the session would record of its nodes is when they were launched, not how long they ran.
        """
        results = self.run(inputs)
        self.run(inputs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            start.record()
            for _ in range(_TIMED_RUNS):
                self.run(inputs)
            end.record()
            end.synchronize()
        ms = start.elapsed_time(end) / _TIMED_RUNS
        return results, [KernelTime(self._region.name, self.provider, ms)]

    def describe(self) -> dict[str, Any]:
        """Provider, placement, and how many CUDA graphs there are."""
        graphs = len(self._buckets)
        return {
            **described(self._session, self._fallbacks),
            "graphed_nodes": len(self._region.graph.calls) if graphs and self.failure is None else 0,
            "cuda_graphs": graphs,
            "cuda_graphs_dropped": self._buckets.dropped,
            "cuda_graph_bytes": 0,  # they lie in ONNX Runtime's arena, which tells nobody
        }

    def notes(self) -> list[Note]:
        """What runs on the CPU, and why there is no CUDA graph."""
        notes = fallback_notes(self._region, self._fallbacks)
        if self.failure is not None:
            reason = f"no CUDA graph: {self.failure}"
            notes.append(Note("missed", self._region.graph.calls[0], reason))
        return notes


def _never_captured(provider: Provider, nodes: Sequence[fx.Node]) -> str | None:
    """Why no graph is tried; None when one is."""
    if provider.name != CUDA:
        return f"{provider.name} keeps its own"
    for node in nodes:
        sizes = getattr(node.meta.get("val"), "shape", ())
        if any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in sizes):
            return f"the size of {node.name} depends on values"
    return None


def _copy(sources: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    """Copy tensors, those of one dtype by one kernel."""
    by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for source, place in zip(sources, places, strict=True):
        into, taken = by_dtype.setdefault(place.dtype, ([], []))
        into.append(place)
        taken.append(source)
    for into, taken in by_dtype.values():
        torch._foreach_copy_(into, taken)
