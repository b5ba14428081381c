"""A function of tensors as a CUDA graph: captured once, replayed with one launch."""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from graphopt.kernels._driver import own_stream

Function = Callable[..., Sequence[Any]]

_AS_IT_IS = nullcontext()
_CAPTURING = threading.Lock()  # PyTorch captures one graph at a time in a process


class CudaGraph:
    """One captured call.

    A graph reads and writes the memory that it was captured with. Inputs are copied there, whatever their
    strides; outputs are copied out, so that no call changes what an older one returned. All tensors of one
    dtype are copied by one kernel.

    Args:
        function: runs on the current stream, waits for nothing and reads no value back.
        inputs: tensors on one GPU.
        pool: of memory, from ``torch.cuda.graph_pool_handle``; graphs that share one must not run at once.
        stream: to capture on; nothing else may run there but captures into the same pool.
        during: entered around the capture, and the run ahead of it that compiles the same kernels.

    Raises:
        RuntimeError: a kernel fails, or does what cannot be captured; memory is short.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[torch.Tensor],
        pool: Any,
        stream: torch.cuda.Stream,
        during: AbstractContextManager[Any],
    ) -> None:
        self._inputs = [torch.empty_like(tensor) for tensor in inputs]
        self._input_places = _by_dtype(inputs)
        with torch.no_grad(), _CAPTURING:
            self._take(inputs)
            self._graph = torch.cuda.CUDAGraph()
            with during:
                function(*self._inputs)  # kernels compile before the capture, and on another stream
                self._outputs = self._captured(function, pool, stream)
            self._result_places = _by_dtype(self._outputs)

    def _captured(self, function: Function, pool: Any, stream: torch.cuda.Stream) -> list[Any]:
        graph = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with warnings.catch_warnings(), graph:
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            return list(function(*self._inputs))

    def replay(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Run on the current stream, on inputs of the captured shapes; returns fresh tensors."""
        self._take(inputs)
        self._graph.replay()
        results = [torch.empty_like(v) if isinstance(v, torch.Tensor) else v for v in self._outputs]
        for places in self._result_places:
            torch._foreach_copy_([results[i] for i in places], [self._outputs[i] for i in places])
        return results

    def _take(self, inputs: Sequence[torch.Tensor]) -> None:
        for places in self._input_places:
            torch._foreach_copy_([self._inputs[i] for i in places], [inputs[i] for i in places])

    def release(self) -> None:
        """Give the memory back to the pool; the graph must not be running."""
        self._inputs, self._outputs = [], []
        self._graph.reset()


def _by_dtype(values: Sequence[Any]) -> list[list[int]]:
    """The places of tensors, those of one dtype together: one kernel copies them."""
    places: dict[torch.dtype, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            places[value.dtype].append(place)
    return list(places.values())


class CudaGraphs:
    """The graphs of one program: one stream order, one memory pool.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._capturing: torch.cuda.Stream | None = None
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._stream: torch.cuda.Stream | None = None
        self._raw_stream = -1

    def here(self) -> AbstractContextManager[Any]:
        """A block in which the GPU is the current device, as all other methods want it."""
        # What a call does ahead of its first kernel a GPU that is idle waits for: no device is set in vain.
        return _AS_IT_IS if torch.cuda.current_device() == self._index else torch.cuda.device(self.device)

    def capture(
        self,
        function: Function,
        inputs: Sequence[torch.Tensor],
        during: AbstractContextManager[Any],
    ) -> CudaGraph:
        """Capture a function; see ``CudaGraph``."""
        if self._capturing is None:
            self._capturing = own_stream(self.device)
        return CudaGraph(function, inputs, self._pool, self._capturing, during)

    def follow(self) -> None:
        """Let the current stream wait for the one that the graphs ran on last: they share their memory."""
        raw = torch._C._cuda_getCurrentRawStream(self._index)  # an eighth of the time of making a Stream
        if raw != self._raw_stream:
            stream = torch.cuda.current_stream(self._index)
            if self._stream is not None:
                stream.wait_stream(self._stream)
            self._stream, self._raw_stream = stream, raw

    def drop(self, graph: CudaGraph) -> None:
        """Release a graph, once it has run."""
        torch.cuda.synchronize(self.device)
        graph.release()

    def bytes(self) -> int:
        """How much memory the pool holds."""
        segments = torch.cuda.memory_snapshot(self._pool)
        return sum(segment["total_size"] for segment in segments)
