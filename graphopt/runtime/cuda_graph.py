"""A function of tensors as a CUDA graph: captured once, replayed with one launch."""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

Function = Callable[..., Sequence[Any]]

_CAPTURING = threading.Lock()  # PyTorch captures one graph at a time in a process


class CudaGraph:
    """One captured call.

    A graph reads and writes the memory that it was captured with. Inputs are copied there, whatever their
    strides; outputs are copied out, so that no call changes what an older one returned. A copy a dtype, each
    of them one kernel for all tensors of one dtype and of their buffers' strides.

    Args:
        function: runs on the current stream, waits for nothing and reads no value back.
        inputs: tensors on one GPU.
        pool: of memory, from ``torch.cuda.graph_pool_handle``; graphs that share one must not run at once.
        device: the GPU.
        during: entered around the capture.

    Raises:
        RuntimeError: a kernel fails, or does what cannot be captured; memory is short.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[torch.Tensor],
        pool: Any,
        device: torch.device,
        during: AbstractContextManager[Any],
    ) -> None:
        self._inputs = [_buffer(tensor) for tensor in inputs]
        with torch.no_grad(), _CAPTURING:
            _copy(self._inputs, inputs)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                function(*self._inputs)  # kernels compile, and libraries allocate, before the capture
            self._graph = torch.cuda.CUDAGraph()
            with (
                during,
                warnings.catch_warnings(),
                torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                self._outputs = list(function(*self._inputs))
            torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Run on the current stream, on inputs of the captured shapes; returns fresh tensors."""
        _copy(self._inputs, inputs)
        self._graph.replay()
        results = [torch.empty_like(v) if isinstance(v, torch.Tensor) else v for v in self._outputs]
        _copy(results, self._outputs)
        return results

    def release(self) -> None:
        """Give the memory back to the pool; the graph must not be running."""
        self._inputs, self._outputs = [], []
        self._graph.reset()


def _buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor of this shape; dense ones keep the order of their strides."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format)


def _copy(to: Sequence[Any], given: Sequence[Any]) -> None:
    """Copy tensors, those of one dtype together."""
    together: dict[torch.dtype, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for target, source in zip(to, given, strict=True):
        if isinstance(target, torch.Tensor):
            targets, sources = together[target.dtype]
            targets.append(target)
            sources.append(source)
    for targets, sources in together.values():
        torch._foreach_copy_(targets, sources)


class CudaGraphs:
    """The graphs of one program: one stream order, one memory pool.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def here(self) -> AbstractContextManager[Any]:
        """A block in which the GPU is the current device, as all other methods want it."""
        return torch.cuda.device(self.device)

    def capture(
        self,
        function: Function,
        inputs: Sequence[torch.Tensor],
        during: AbstractContextManager[Any],
    ) -> CudaGraph:
        """Capture a function; see ``CudaGraph``."""
        return CudaGraph(function, inputs, self._pool, self.device, during)

    def follow(self) -> None:
        """Let the current stream wait for the one that the graphs ran on last: they share their memory."""
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def drop(self, graph: CudaGraph) -> None:
        """Release a graph, once it has run."""
        torch.cuda.synchronize(self.device)
        graph.release()

    def bytes(self) -> int:
        """How much memory the pool holds."""
        segments = torch.cuda.memory_snapshot(self._pool)
        return sum(segment["total_size"] for segment in segments)
