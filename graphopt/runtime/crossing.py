"""What it costs that one executor hands over to another, and what a node costs on each."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.compiler.cost import VIEWS, milliseconds, node_cost, node_dtype
from graphopt.compiler.device import Limits
from graphopt.errors import GraphoptError
from graphopt.ir.graph import Graph, is_getitem, is_symbolic
from graphopt.ir.op import op_of
from graphopt.runtime.executors import Executor
from graphopt.runtime.region import Region
from graphopt.runtime.regions import Unit
from graphopt.runtime.target import Target

_CALLS = 30


@dataclass(frozen=True)
class Speed:
    """What an executor takes beyond a node's roofline.

    Args:
        call_ms: to run a region once, whatever is in it, in milliseconds.
        node_ms: to run one node, likewise.
        slowdown: times the roofline that a node takes; large products come near it on all executors.
        decomposed: the same for graphopt's ops, where the executor runs their parts one by one.
        copies: what crosses its border is copied: a CUDA graph reads and writes memory of its own.
    """

    call_ms: float
    node_ms: float
    slowdown: float = 1.0
    decomposed: float = 1.0
    copies: bool = False


# On an EPYC with AVX-512 (PyTorch 2.13, ONNX Runtime 1.31): a call of a region of one relu of one number, and
# what one node more of that kind adds; Inductor's are taken to lie between. Slowdown: BERT-base 1x128 takes
# 118 ms in eager, 105 in ONNX Runtime. OpenVINO's are taken for ONNX Runtime's; a call is measured where it
# is installed. Decomposed: a layer norm with its sum is read and written twice.
_CPU = {
    "ort": Speed(0.015, 0.0005),
    "openvino": Speed(0.015, 0.0005),
    "inductor": Speed(0.01, 0.0005),
    "eager": Speed(0.004, 0.002, slowdown=1.1, decomposed=2.0),
}
# Estimates for a GPU: the launch of a CUDA graph and of the two kernels that copy its inputs and outputs, and
# a launch from Python; calls are measured where they can be (see ``speed_of``).
_CUDA = {
    "cuda": Speed(0.02, 0.001, copies=True),
    "inductor": Speed(0.02, 0.001, copies=True),
    "eager": Speed(0.005, 0.005, slowdown=1.1, decomposed=2.0),
}
_UNKNOWN = Speed(0.03, 0.003)  # an executor that the tables do not have
_QUICK = ("ort", "openvino", "eager", "cuda")  # those that compile a region of one node at once


def speed_of(executor: Executor, target: Target, *, measured: bool) -> Speed:
    """What an executor takes on a target.

    Args:
        executor: the executor.
        target: the target.
        measured: time its overhead a call here, once a process (a few milliseconds), where it compiles
            quickly; otherwise, and where it cannot run, the table's is taken.
    """
    table = _CUDA if target.device.type == "cuda" else _CPU
    known = table.get(executor.name, _UNKNOWN)
    if not measured or executor.name not in _QUICK:
        return known
    found = _measured_call_ms(executor, target.device)  # type: ignore[arg-type]  # executors are hashed by identity
    return known if found is None else replace(known, call_ms=found)


@functools.cache
def _measured_call_ms(executor: Executor, device: torch.device) -> float | None:
    """The shortest time of a call of a region of one tiny node; None where it does not run."""
    x = torch.ones(1, device=device)
    try:
        program = executor.compile(_tiny_region(x), Target(device), "fast")
        times = []
        for _ in range(_CALLS):
            start = time.perf_counter()
            program.run([x])
            times.append(time.perf_counter() - start)
    except (GraphoptError, RuntimeError):
        return None
    return 1e3 * min(times)


def _tiny_region(x: torch.Tensor) -> Region:
    graph = fx.Graph()
    fake_mode = FakeTensorMode()
    val = fake_mode.from_tensor(x)
    read = graph.placeholder("x")
    write = graph.call_function(torch.ops.aten.relu.default, (read,))
    read.meta["val"] = write.meta["val"] = val
    graph.output((write,))
    ins, out = pytree.tree_structure(((0,), {})), pytree.tree_structure((0,))
    whole = Graph(fx.GraphModule({}, graph), {}, (), ins, out, fake_mode)
    return Region("overhead", whole, (read.name,), (write.name,))


class Costs:
    """The model of what regions cost, in milliseconds.

    Args:
        executors: those that there are.
        target: where they run.
        effort: "measured" times what a call of each costs.
    """

    def __init__(self, executors: Sequence[Executor], target: Target, effort: str) -> None:
        self.limits = target.limits
        self.speeds = {
            executor.name: speed_of(executor, target, measured=effort == "measured") for executor in executors
        }

    def of_units(
        self, units: Sequence[Unit], refusals: Sequence[Mapping[str, str | None]]
    ) -> list[dict[str, float]]:
        """By unit, what it costs on each executor that takes it."""
        return [
            {
                name: _unit_ms(unit.nodes, self.speeds[name], self.limits)
                for name, reason in found.items()
                if reason is None
            }
            for unit, found in zip(units, refusals, strict=True)
        ]

    def of_change(self, before: str | None, after: str, alive: float) -> float:
        """Calling the next region, so many bytes of values being there that it or a later one reads."""
        copies = self.speeds[after].copies + (before is not None and self.speeds[before].copies)
        return self.speeds[after].call_ms + copies * 2e3 * alive / self.limits.bytes_per_s


def _unit_ms(nodes: Sequence[fx.Node], speed: Speed, limits: Limits) -> float:
    """What nodes take on an executor, in milliseconds."""
    total = 0.0
    for node in nodes:
        if is_getitem(node) or is_symbolic(node) or node.target in VIEWS:
            continue
        factor = speed.slowdown if op_of(node.target) is None else speed.decomposed
        total += speed.node_ms + factor * milliseconds(node_cost(node), limits, node_dtype(node))
    return total
