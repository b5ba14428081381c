"""The ``cuda`` executor: a region as one CUDA graph a shape, each node on the implementation measured best.

What a shape needs is found out when it comes first: the region runs node by node, and every call of a new
signature is given to the fastest of its implementations that is as exact as the reference.

A region that packs tokens has graphs for their number besides, rounded up to a bucket (``token_buckets.py``):
the host counts them, which is the only time that it waits for the GPU.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.compiler.device import device_limits
from graphopt.ir.graph import Graph, is_getitem, is_symbolic, op_name, writes_in_place
from graphopt.kernels._triton import OLDEST, capability, prefetched_weights
from graphopt.runtime.choosing import Choosing
from graphopt.runtime.executors._protocol import KernelTime, Note
from graphopt.runtime.graphed import GRAPHS, Graphed
from graphopt.runtime.implementations import reads_back
from graphopt.runtime.joining import joined
from graphopt.runtime.region import Region
from graphopt.runtime.scheduling.branches import arranged
from graphopt.runtime.side_streams import Beside, SideStreams, calls_of, compared, side_streams
from graphopt.runtime.target import Target
from graphopt.runtime.token_buckets import fix_sizes, sizes_of, varying_sizes

_BUCKETS = 16  # graphs of a region that packs tokens: so many are a range of one to 1.5 of their number
_PROFILED_RUNS = 5
_AHEAD_CYCLES = 100_000_000  # the GPU is kept busy for 50 ms while all work of a profiled run is queued

# Linear algebra that reads nothing back; its neighbours (inverse, eigenvalues) wait to see if they failed.
_QUIET_LINALG = ("linalg_vector_norm", "linalg_norm", "linalg_matrix_norm", "linalg_cross", "linalg_vecdot")


class CudaProgram:
    """A region on a GPU.

    Args:
        region: the region.
        device: that its tensors are on.
        timed: measure implementations, and whether branches run side by side, on the first inputs; otherwise
            each op takes its preferred one, and branches run in order.

    Raises:
        LoweringError: the region packs tokens by a mask that it computes itself.
    """

    def __init__(self, region: Region, device: torch.device, *, timed: bool) -> None:
        self._region = replace(region, graph=joined(region.graph))
        self._masks = fix_sizes(self._region.graph)  # places among the inputs; a size each is an input behind
        self._nodes = len(region.graph.calls)
        self._device = device
        self._timed = timed
        self._beside: Beside | None = None
        self._choosing = Choosing(self._region.graph, timed=timed)
        # Weights are never written by the region; a user who writes one between two calls does so in the
        # stream's order, and a graph's first kernel starts when all before it is done.
        weights = [constant.tensor for constant in self._region.graph.constants.values()]
        self._during = functools.partial(_capturing, weights)
        self._graphed = Graphed(device, self._specialise, self._during, _BUCKETS if self._masks else GRAPHS)

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run on the current stream; returns fresh tensors."""
        return self._graphed.run(inputs, sizes_of(inputs, self._masks))

    def _specialise(self, inputs: Sequence[torch.Tensor], *sizes: int) -> fx.GraphModule | SideStreams:
        """The region with every call replaced by the implementation for these shapes, on streams that pay.

        Sizes are put in as numbers.

        Only the first inputs are measured on: what comes at a user's call is decided by what is known.
        """
        chosen = _Chosen(self._region.graph.module, self._choosing)
        with _benchmarking():
            chosen.run(*inputs, *sizes)
        self._choosing.settle()
        graph = fx.Graph()
        given = self._region.graph.placeholders[len(inputs) :]
        made: dict[fx.Node, Any] = dict(zip(given, sizes, strict=True))
        graph.output(graph.graph_copy(self._region.graph.fx, made))
        for node, run in chosen.runs.items():
            made[node].target = run
        module = fx.GraphModule(self._region.graph.module, graph)
        return self._branched(module, made, inputs)

    def _branched(
        self, module: fx.GraphModule, made: dict[fx.Node, Any], inputs: Sequence[torch.Tensor]
    ) -> fx.GraphModule | SideStreams:
        """The same with its branches on several streams, where a simulation and the first shape agree."""
        calls = self._region.graph.calls
        if not self._timed or self._device.type != "cuda" or any(map(writes_in_place, calls)):
            return module
        if self._masks:  # how many tokens there are is known of the call, not of the region
            return module
        if self._beside is not None and not self._beside.pays:
            return module
        limits = device_limits(self._device)
        arrangement = arranged(calls_of(self._region.graph, self._choosing.measured(), limits))
        if arrangement.streams == 1:
            return module
        nodes = {node.name: made[node] for node in calls}
        found = SideStreams(module, arrangement, nodes, self._device)
        if self._beside is None:
            with self._during():
                self._beside = compared(found, inputs, self._device)
        return found if self._beside.pays else module

    def describe(self) -> dict[str, Any]:
        """What the plan's row says of the program."""
        return {
            "graphed_nodes": self._nodes if self._graphed.captured else 0,
            **self._graphed.describe(),
            "streams": self._beside.streams if self._beside is not None and self._beside.pays else 1,
            **({"token_buckets": self._buckets()} if self._masks else {}),
            "kernels": [decision.to_dict() for decision in self._choosing.decisions],
        }

    def _buckets(self) -> list[int]:
        """How many tokens each graph computes; of several masks together."""
        return sorted({sum(sizes) for sizes in self._graphed.sizes})

    def notes(self) -> list[Note]:
        """What was chosen where there was a choice, and why there is no graph."""
        nodes = {node.name: node for node in self._region.graph.calls}
        notes = [
            Note("analysis", nodes[decision.nodes[0]], decision.reason)
            for decision in self._choosing.decisions
            if decision.us or decision.refused
        ]
        if self._beside is not None:
            reason = f"{self._region.name}: {self._beside.reason}"
            notes.append(Note("analysis", self._region.graph.calls[0], reason))
        return [*notes, *graphless(self._region, self._graphed)]

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run the same kernels one by one, and tell what each takes on the GPU.

        All work is queued while the GPU is kept busy, so that what passes between two events is the GPU's own
        time; what passes between two events with nothing between them is taken off.
        """
        results = self.run(inputs)
        function = self._graphed.function(inputs, sizes_of(inputs, self._masks))
        module = function.module if isinstance(function, SideStreams) else function
        assert isinstance(module, fx.GraphModule)
        rows: dict[str, list[KernelTime]] = {}
        kernels = {name: d.chosen.name for d in self._choosing.decisions for name in d.nodes}
        with torch.no_grad(), torch.cuda.device(self._device):
            for _ in range(_PROFILED_RUNS):
                timed = _Timed(module)
                torch.cuda._sleep(_AHEAD_CYCLES)
                timed.run(*inputs)
                nothing = _event(), _event()
                torch.cuda.synchronize()
                event_ms = nothing[0].elapsed_time(nothing[1])
                for node, row in zip(computing(self._region.graph), timed.events, strict=True):
                    op = f"{op_name(node)} ({kernels[node.name]})"
                    took = max(0.0, row[0].elapsed_time(row[1]) - event_ms)
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
        run = self._choosing.decide(n, args, kwargs).run
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
        start = _event()
        result = super().run_node(n)
        self.events.append((start, _event()))
        return result


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def computing(graph: Graph) -> list[fx.Node]:
    """The calls that an implementation runs: sizes and parts of tuples are left out."""
    return [node for node in graph.calls if not is_getitem(node) and not is_symbolic(node)]


def graphless(region: Region, graphed: Graphed) -> list[Note]:
    """The remark that a region has no CUDA graph, and why."""
    if graphed.failure is None:
        return []
    reason = f"{region.name} runs without a CUDA graph: {graphed.failure}"
    return [Note("missed", region.graph.calls[0], reason)]


@contextmanager
def _capturing(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Around a capture: branches may run side by side, and kernels read weights early."""
    with prefetched_weights(weights), side_streams():
        yield


@contextmanager
def _benchmarking() -> Iterator[None]:
    """Let cuDNN measure its algorithms for shapes that are new to it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
    varying = varying_sizes(node)
    if varying is not None:
        return f"the size of what {op_name(node)} gives {varying}"
    if any(value.device.type != device.type for value in made):
        return f"{op_name(node)} gives a tensor on {made[0].device}"
    for source in node.all_input_nodes:
        value = source.meta["val"]
        if isinstance(value, torch.Tensor) and value.device.type != device.type and value.dim():
            return f"{op_name(node)} reads {source.name}, which is on {value.device}"
    name = op_name(node).rpartition(".")[2]
    if name == "inverse" or (name.lstrip("_").startswith("linalg_") and name not in _QUIET_LINALG):
        return f"{op_name(node)} waits for the GPU to see whether it failed"
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return f"{op_name(node)} draws random numbers"
    reason = reads_back(node, device)
    return None if reason is None else f"{op_name(node)} waits for the GPU: {reason}"
