"""The ``cuda`` executor: a region as one CUDA graph a shape, each node on the implementation measured best.

What a shape needs is found out when it comes first: the region runs node by node, and every call of a new
signature is given to the fastest of its implementations that is as exact as the reference. A shape that comes
again is captured; the least recently used graph makes room (see ``buckets.py``). What has no graph runs on the
same kernels, launched one by one.
"""

from __future__ import annotations

import statistics
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt.errors import said
from graphopt.ir.graph import Graph, is_getitem, is_symbolic, op_name
from graphopt.kernels._triton import OLDEST, capability, prefetched_weights
from graphopt.runtime.buckets import Buckets
from graphopt.runtime.choosing import Choosing
from graphopt.runtime.cuda_graph import CudaGraph, CudaGraphs
from graphopt.runtime.executors._protocol import KernelTime, Note
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target

_GRAPHS = 8  # shapes of a program that have a graph
_MODULES = 64  # shapes whose implementations are remembered

_PROFILED_RUNS = 5
_AHEAD_CYCLES = 100_000_000  # the GPU is kept busy for 50 ms while all work of a profiled run is queued

# Linear algebra that reads nothing back; its neighbours (inverse, eigenvalues) wait to see if they failed.
_QUIET_LINALG = ("linalg_vector_norm", "linalg_norm", "linalg_matrix_norm", "linalg_cross", "linalg_vecdot")


class CudaProgram:
    """A region on a GPU.

    Args:
        region: the region.
        device: that its tensors are on.
        timed: measure implementations on the first inputs; otherwise each op takes its preferred one.
    """

    def __init__(self, region: Region, device: torch.device, *, timed: bool) -> None:
        self._region = region
        self._choosing = Choosing(region.graph, timed=timed)
        self._graphs = CudaGraphs(device)
        self._buckets: Buckets[CudaGraph] = Buckets(_GRAPHS)
        self._modules: OrderedDict[tuple[Any, ...], fx.GraphModule] = OrderedDict()
        self._lock = threading.Lock()
        self._failure: tuple[fx.Node, str] | None = None

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run on the current stream, after whatever ran there before; returns fresh tensors."""
        key = tuple(tensor.shape for tensor in inputs)
        with self._lock, torch.no_grad():
            self._graphs.follow()
            graph = self._buckets.find(key)
            if graph is not None:
                return graph.replay(inputs)
            first = not self._modules
            module = self._modules.get(key)
            if module is None:
                module = self._modules[key] = self._specialise(inputs)
                self._choosing.settle()
                if len(self._modules) > _MODULES:
                    self._modules.popitem(last=False)
            self._modules.move_to_end(key)
            if (self._buckets.earns(key) or first) and self._failure is None and inputs:
                graph = self._capture(key, module, inputs)
                if graph is not None:
                    return graph.replay(inputs)
            return _fresh(module(*inputs), inputs)

    def _capture(
        self, key: tuple[Any, ...], module: fx.GraphModule, inputs: Sequence[torch.Tensor]
    ) -> CudaGraph | None:
        """Capture a shape; what cannot be captured is run without a graph from then on, with a remark."""
        old = self._buckets.room()
        if old is not None:
            self._graphs.drop(old)
        try:
            graph = self._graphs.capture(module, inputs, prefetched_weights())
        except (RuntimeError, AssertionError) as error:  # OutOfMemoryError is a RuntimeError
            self._failure = self._region.graph.calls[0], said(error).splitlines()[0]
            torch.cuda.empty_cache()
            return None
        self._buckets.add(key, graph)
        return graph

    def _specialise(self, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        """The region with every call replaced by the implementation for these shapes."""
        chosen = _Chosen(self._region.graph.module, self._choosing)
        with _benchmarking():
            chosen.run(*inputs)
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self._region.graph.fx, made))
        for node, run in chosen.runs.items():
            made[node].target = run
        return fx.GraphModule(self._region.graph.module, graph)

    def describe(self) -> dict[str, Any]:
        """What the plan's row says of the program."""
        captured = len(self._buckets) > 0 and self._failure is None
        return {
            "graphed_nodes": len(computing(self._region.graph)) if captured else 0,
            "cuda_graphs": len(self._buckets),
            "cuda_graphs_dropped": self._buckets.dropped,
            "cuda_graph_bytes": self._graphs.bytes() if len(self._buckets) else 0,
            "kernels": [decision.to_dict() for decision in self._choosing.decisions],
        }

    def notes(self) -> list[Note]:
        """What was chosen where there was a choice, and why there is no graph."""
        nodes = {node.name: node for node in self._region.graph.calls}
        notes = [
            Note("analysis", nodes[decision.nodes[0]], decision.reason)
            for decision in self._choosing.decisions
            if decision.us or decision.refused
        ]
        if self._failure is not None:
            node, reason = self._failure
            notes.append(Note("missed", node, f"{self._region.name} runs without a CUDA graph: {reason}"))
        return notes

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run the same kernels one by one, and tell what each takes on the GPU.

        All work is queued while the GPU is kept busy, so that what passes between two events is the GPU's time
        alone: a kernel, its launch gap, and about a microsecond for the event.
        """
        results = self.run(inputs)
        module = self._modules[tuple(tensor.shape for tensor in inputs)]
        rows: dict[str, list[KernelTime]] = {}
        kernels = {name: d.chosen.name for d in self._choosing.decisions for name in d.nodes}
        with torch.no_grad(), torch.cuda.device(self._graphs.device):
            for _ in range(_PROFILED_RUNS):
                timed = _Timed(module)
                torch.cuda._sleep(_AHEAD_CYCLES)
                timed.run(*inputs)
                torch.cuda.synchronize()
                for node, row in zip(computing(self._region.graph), timed.events, strict=True):
                    op = f"{op_name(node)} ({kernels[node.name]})"
                    took = row[0].elapsed_time(row[1])
                    rows.setdefault(node.name, []).append(KernelTime(node.name, op, took))
        return results, [
            KernelTime(name, times[0].op, statistics.median(time.ms for time in times))
            for name, times in rows.items()
        ]


class _Chosen(fx.Interpreter):
    """Runs a region node by node, and decides what runs each.

    Attributes:
        runs: by node, the function to call in its place.
    """

    def __init__(self, module: fx.GraphModule, choosing: Choosing) -> None:
        super().__init__(module)
        self._choosing = choosing
        self.runs: dict[fx.Node, Callable[..., Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or is_getitem(n) or is_symbolic(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        run = self._choosing.decide(n, args, kwargs).chosen.run
        self.runs[n] = run
        return run(*args, **kwargs)


class _Timed(fx.Interpreter):
    """Runs a region with an event before and after every call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or is_getitem(n) or is_symbolic(n):
            return super().run_node(n)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = super().run_node(n)
        end.record()
        self.events.append((start, end))
        return result


def computing(graph: Graph) -> list[fx.Node]:
    """The calls that an implementation runs: sizes and parts of tuples are left out."""
    return [node for node in graph.calls if not is_getitem(node) and not is_symbolic(node)]


@contextmanager
def _benchmarking() -> Any:
    """Let cuDNN measure its algorithms for shapes that are new to it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _fresh(results: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[Any]:
    """The results; a view of an input is copied, as a graph's outputs are."""
    held = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return [
        value.clone()
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in held
        else value
        for value in results
    ]


class Cuda:
    """Runs regions on NVIDIA GPUs."""

    name = "cuda"

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why a node cannot be in a CUDA graph, or None."""
        if target.device.type != "cuda":
            return f"the cuda executor runs on a GPU, the target is {target}"
        if capability(target.device) < OLDEST:
            return "the cuda executor needs a GPU of compute capability 8.0 or later"
        if is_getitem(node) or is_symbolic(node):
            return None
        return uncapturable(node, target.device)

    def compile(self, region: Region, target: Target, effort: str) -> CudaProgram:
        """Take a region; kernels are chosen, and the graph captured, on the first inputs."""
        return CudaProgram(region, target.device, timed=effort == "measured")


def uncapturable(node: fx.Node, device: torch.device) -> str | None:
    """Why a call cannot be captured: its sizes depend on values, or it waits for the GPU."""
    made = [leaf for leaf in pytree.tree_leaves(node.meta["val"]) if isinstance(leaf, torch.Tensor)]
    if any(free_unbacked_symbols(value) for value in made):
        return f"the size of what {op_name(node)} gives depends on values"
    if any(value.device.type != device.type for value in made):
        return f"{op_name(node)} gives a tensor on {made[0].device}"
    for source in node.all_input_nodes:
        value = source.meta["val"]
        if isinstance(value, torch.Tensor) and value.device.type != device.type and value.dim():
            return f"{op_name(node)} reads {source.name}, which is on {value.device}"
    name = op_name(node).rpartition(".")[2]
    if name.lstrip("_").startswith("linalg_") and name not in _QUIET_LINALG or name == "inverse":
        return f"{op_name(node)} waits for the GPU to see whether it failed"
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return f"{op_name(node)} draws random numbers"
    return None
