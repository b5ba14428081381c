"""The ``eager`` executor: PyTorch runs the region node by node. It takes everything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import op_name
from graphopt.runtime.arena import arena_for
from graphopt.runtime.executors._protocol import KernelTime, Silent
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target


class EagerProgram(Silent):
    """A region as generated Python over ATen ops, those values in one block that are worth it."""

    def __init__(self, region: Region) -> None:
        region.graph.module.recompile()
        self._module = region.graph.module
        self._arena = arena_for(region.graph)

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the region under ``no_grad``."""
        with torch.no_grad():
            if self._arena is not None:
                return self._arena.run(inputs)
            results: Sequence[Any] = self._module.forward(*inputs)
        return results

    def describe(self) -> dict[str, Any]:
        """What the plan's row says of the block."""
        return {} if self._arena is None else self._arena.describe()

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run node by node, and time each."""
        timed = _Timed(self._module)
        with torch.no_grad():
            results: Sequence[Any] = timed.run(*inputs)
        return results, timed.times


class _Timed(fx.Interpreter):
    """Runs a region node by node, waiting for each."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.times: list[KernelTime] = []

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if n.op == "call_function":
            self.times.append(KernelTime(n.name, op_name(n), 1e3 * (time.perf_counter() - start)))
        return result


class Eager:
    """Runs regions in PyTorch."""

    name = "eager"

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Everything is supported."""
        return None

    def compile(self, region: Region, target: Target, effort: str) -> EagerProgram:
        """Generate the region's Python."""
        return EagerProgram(region)
