"""The ``inductor`` executor: a region compiled by PyTorch's Inductor, and on a GPU run by our CUDA graphs.

Inductor sees plain ATen: graphopt's ops stand as their references, so that it fuses what it likes. The region
is compiled from its own graph, without Dynamo: there are no guards to check at a call. Weights are frozen,
which lets Inductor choose their layout.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx

from graphopt.errors import LoweringError, said
from graphopt.ir.graph import is_getitem, is_symbolic, op_name
from graphopt.ir.op import op_of
from graphopt.runtime.executors._protocol import KernelTime, Note
from graphopt.runtime.executors._remade import Remade
from graphopt.runtime.executors.cuda import computing, graphless, uncapturable
from graphopt.runtime.graphed import Graphed
from graphopt.runtime.implementations import untraceable
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target


class InductorProgram:
    """A region as Inductor's code.

    Args:
        region: the region.
        device: that its tensors are on.
        compiled: compiles the region.

    Raises:
        Exception: whatever Inductor raises.
    """

    def __init__(self, region: Region, device: torch.device, compiled: Callable[[], _Compiled]) -> None:
        self._region = region
        self._device = device
        self._compiled = Remade(compiled)
        on_gpu = device.type == "cuda"
        self._outside = _outside(region, device) if on_gpu else None
        graphed = on_gpu and self._outside is None
        self._graphed = Graphed(device, lambda _: self._function) if graphed else None

    @property
    def _function(self) -> Callable[..., Any]:
        return self._compiled.get().function

    def rest(self) -> None:
        """Let go of frozen weights, on a CPU, until the next run has the code compiled, or loaded, again."""
        if self._graphed is None and self._compiled.drop():
            gc.collect()  # what Inductor makes refers to itself in circles

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the compiled code."""
        if self._graphed is not None:
            return self._graphed.run(inputs)
        with torch.no_grad():
            results: Sequence[Any] = self._function(*inputs)
        return results

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run; the code tells no node's time apart, so the region has one row, the fastest of three calls."""
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            results = self.run(inputs)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            best = min(best, time.perf_counter() - start)
        return results, [KernelTime(self._region.name, "inductor", 1e3 * best)]

    def describe(self) -> dict[str, Any]:
        """What the plan's row says of the program."""
        if self._graphed is None:
            return {}
        nodes = len(self._region.graph.calls) if self._graphed.captured else 0
        return {"graphed_nodes": nodes, **self._graphed.describe()}

    def notes(self) -> list[Note]:
        """Why there is no CUDA graph."""
        if self._outside is not None:
            return [self._outside]
        return [] if self._graphed is None else graphless(self._region, self._graphed)


def _outside(region: Region, device: torch.device) -> Note | None:
    """The remark that a region is not tried as a CUDA graph, at the call that none can hold."""
    for node in computing(region.graph):
        reason = uncapturable(node, device)
        if reason is not None:
            return Note("missed", node, f"{region.name} runs without a CUDA graph: {reason}")
    return None


class Inductor:
    """Compiles regions with Inductor."""

    name = "inductor"

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why Inductor cannot take a node: of complex values, or with a reference that it cannot trace."""
        if is_getitem(node) or is_symbolic(node):
            return None
        values = [node, *node.all_input_nodes]
        if any(getattr(n.meta["val"], "dtype", torch.float32).is_complex for n in values):
            return "Inductor generates no code for complex values"
        reason = untraceable(node, target.device)
        return None if reason is None else f"Inductor cannot trace {op_name(node)}: {reason}"

    def compile(self, region: Region, target: Target, effort: str) -> InductorProgram:
        """Compile a region; takes tens of seconds for a model of a hundred million weights.

        Raises:
            LoweringError: there is no C++ compiler, or Inductor cannot compile the region.
        """

        def compiled() -> _Compiled:
            examples = [node.meta["val"] for node in region.graph.placeholders]
            with torch.no_grad():
                return _compile_fx(_plain(region), examples, _options(target, effort))

        try:
            return InductorProgram(region, target.device, compiled)
        except Exception as error:  # Inductor raises whatever the compilers behind it do
            raise LoweringError(
                f"Inductor cannot compile the region: {said(error).splitlines()[0]}"
            ) from error


class _Compiled:
    """What Inductor has made; with it go the weights.

    Args:
        function: runs it.
        modules: of its code, nobody else's. Python and Inductor keep them for the process's life, and they
            would keep the weights.
    """

    def __init__(self, function: Callable[..., Any], modules: Sequence[ModuleType]) -> None:
        self.function = function
        weakref.finalize(self, _forget_tensors, modules)


def _forget_tensors(modules: Sequence[ModuleType]) -> None:
    for module in modules:
        for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
            delattr(module, name)


def _compile_fx(module: fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]) -> _Compiled:
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx  # slow to import, and rarely needed
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()  # raises early, rather than after all of the tracing
    before = set(map(id, PyCodeCache.modules))
    function: Any = compile_fx(module, list(examples), config_patches=options)
    before |= set(map(id, PyCodeCache.modules_no_attr.values()))  # who else compiles the same has these, too
    return _Compiled(function, [module for module in PyCodeCache.modules if id(module) not in before])


def _options(target: Target, effort: str) -> dict[str, Any]:
    """Inductor's best mode for inference; the CUDA graphs are ours."""
    on_gpu = target.device.type == "cuda"
    return {"freezing": True, "triton.cudagraphs": False, "max_autotune": on_gpu and effort == "measured"}


def _plain(region: Region) -> fx.GraphModule:
    """The region with graphopt's ops as their references, which trace to ATen."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(region.graph.fx, made))
    for node in graph.nodes:
        op = op_of(node.target)
        if op is not None:
            node.target = op.reference
    return fx.GraphModule(region.graph.module, graph)
