"""A program of CUDA graphs: one for every shape that comes again, and a way without one for all others."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from graphopt.errors import said
from graphopt.runtime.buckets import Buckets
from graphopt.runtime.cuda_graph import CudaGraph, CudaGraphs, Function

GRAPHS = 8  # shapes that have a graph
_FUNCTIONS = 64  # shapes that a function is remembered for
_QUIET = nullcontext()

Sizes = tuple[int, ...]
Shapes = tuple[tuple[torch.Size, ...], Sizes]


class Graphed:
    """Runs what is prepared for a shape as a CUDA graph.

    The first shape is captured at once, any other when it comes a second time; the least recently used graph
    makes room (see ``buckets.py``). Until then, and where a capture fails, the same kernels are launched one
    by one. Calls from several threads and streams run one after the other: the graphs share their memory.

    Args:
        device: a GPU.
        prepare: the function for inputs of these shapes; it may run them. Takes the inputs, and the sizes
            besides that ``run`` was given.
        during: entered around a capture.
        limit: how many shapes have a graph.

    Attributes:
        failure: why the last capture failed, in words; None when it did not.
    """

    def __init__(
        self,
        device: torch.device,
        prepare: Callable[..., Function],
        during: Callable[[], AbstractContextManager[Any]] = nullcontext,
        limit: int = GRAPHS,
    ) -> None:
        self.failure: str | None = None
        self._prepare = prepare
        self._during = during
        self._graphs = CudaGraphs(device)
        self._buckets: Buckets[CudaGraph] = Buckets(limit)
        self._functions: OrderedDict[Shapes, Function] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, inputs: Sequence[torch.Tensor], sizes: Sizes = ()) -> list[Any]:
        """Run on the current stream, after whatever ran there before; returns fresh tensors.

        Args:
            inputs: tensors on the GPU.
            sizes: those of inner values that depend on more than shapes; each combination is a shape of its
                own.
        """
        key = _shapes(inputs), sizes
        quiet = torch.no_grad() if torch.is_grad_enabled() else _QUIET
        with self._lock, quiet, self._graphs.here():
            self._graphs.follow()
            graph = self._buckets.find(key)
            if graph is None:
                first = not self._functions
                function = self._function(key, inputs)
                if self._buckets.earns(key) or first:
                    graph = self._capture(key, function, inputs)
                if graph is None:
                    return _fresh(function(*inputs), inputs)
            return graph.replay(inputs)

    def function(self, inputs: Sequence[torch.Tensor], sizes: Sizes = ()) -> Function:
        """What runs inputs of these shapes, without a graph."""
        with self._lock, torch.no_grad(), self._graphs.here():
            return self._function((_shapes(inputs), sizes), inputs)

    @property
    def captured(self) -> bool:
        """True when there is a graph, and none failed to be made."""
        return self.failure is None and len(self._buckets) > 0

    @property
    def sizes(self) -> list[Sizes]:
        """The sizes besides shapes of every graph, the least recently used first."""
        return [sizes for _, sizes in self._buckets.kept]

    def describe(self) -> dict[str, Any]:
        """Count and bytes of the graphs, for the plan's row."""
        return {
            "cuda_graphs": len(self._buckets),
            "cuda_graphs_dropped": self._buckets.dropped,
            "cuda_graph_bytes": self._graphs.bytes() if len(self._buckets) else 0,
        }

    def _function(self, key: Shapes, inputs: Sequence[torch.Tensor]) -> Function:
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._prepare(inputs, *key[1])
            if len(self._functions) > _FUNCTIONS:
                self._functions.popitem(last=False)
        self._functions.move_to_end(key)
        return function

    def _capture(self, key: Shapes, function: Function, inputs: Sequence[torch.Tensor]) -> CudaGraph | None:
        """Capture a shape. After a failure nothing is captured any more: the next would fail as well."""
        if self.failure is not None:
            return None
        old = self._buckets.room()
        if old is not None:
            self._graphs.drop(old)
        try:
            graph = self._graphs.capture(function, inputs, self._during())
        except (RuntimeError, AssertionError) as error:  # OutOfMemoryError is a RuntimeError
            self.failure = said(error).splitlines()[0]
            torch.cuda.empty_cache()
            return None
        self._buckets.add(key, graph)
        return graph


def _shapes(inputs: Sequence[torch.Tensor]) -> tuple[torch.Size, ...]:
    return tuple([tensor.shape for tensor in inputs])


def _fresh(results: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[Any]:
    """The results; a view of an input is copied, as a graph's outputs are."""
    held = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return [
        value.clone()
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in held
        else value
        for value in results
    ]
