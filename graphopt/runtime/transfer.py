"""What a plan over several devices needs: values copied to another device, and regions moved there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.ir.graph import Constant, Graph
from graphopt.runtime.executors import KernelTime
from graphopt.runtime.executors._protocol import Silent
from graphopt.runtime.plan import Step
from graphopt.runtime.region import Region

EXECUTOR = "transfer"

Weights = dict[tuple[Any, ...], torch.Tensor]


class Transfer(Silent):
    """Copies a value to another device; where one of the two is a GPU, the host does not wait for the copy.

    A GPU copies by itself from pinned memory and into it, so what lies elsewhere in the host's memory is
    written into pinned memory first. Who reads the copy has to wait for the stream that it was queued on.

    Args:
        value: name of what is copied.
        source: the device that it is on.
        device: the device that it goes to.
    """

    def __init__(self, value: str, source: torch.device, device: torch.device) -> None:
        self.value, self.source, self.device = value, source, device

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Queue the copy on the current streams of the two devices."""
        (x,) = inputs
        if x.is_cuda and self.device.type == "cpu":
            return [torch.empty_like(x, device=self.device, pin_memory=True).copy_(x, non_blocking=True)]
        if not x.is_cuda and self.device.type == "cuda" and not x.is_pinned():
            x = x.pin_memory()
        return [x.to(self.device, non_blocking=True, copy=True)]

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Copy, wait for it, and tell how long that took."""
        self._wait()
        start = time.perf_counter()
        results = self.run(inputs)
        self._wait()
        return results, [KernelTime(self.value, EXECUTOR, 1e3 * (time.perf_counter() - start))]

    def _wait(self) -> None:
        for device in (self.source, self.device):
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def describe(self) -> dict[str, Any]:
        """Where the value comes from."""
        return {"from": str(self.source)}


def transfer(name: str, value: fx.Node, reads: str, writes: str, way: Sequence[torch.device]) -> Step:
    """A copy as a step of a plan.

    Args:
        name: of the step.
        value: the node that makes what is copied.
        reads: its name where it is.
        writes: its name where it goes.
        way: the device that it is on, and the one that it goes to.
    """
    source, device = way
    graph = fx.Graph()
    val = value.meta["val"]
    taken = graph.placeholder(reads)
    copy = graph.create_node(
        "call_function", torch.ops.aten._to_copy.default, (taken,), {"device": device}, writes
    )
    taken.meta, copy.meta = dict(value.meta), {**value.meta, "val": on_device(val, device)}
    graph.output((copy,))
    ins, out = pytree.tree_structure(((0,), {})), pytree.tree_structure((0,))
    whole = Graph(fx.GraphModule({}, graph), {}, (), ins, out, val.fake_mode)
    region = Region(name, whole, (reads,), (writes,))
    return Step(EXECUTOR, region, Transfer(reads, source, device), device=device, reason="another device")


def relocated(region: Region, device: torch.device, reads: Sequence[str], weights: Weights) -> Region:
    """A region on another device: its constants are copied there, and what it makes is made there.

    Args:
        region: stays as it is.
        device: the other one.
        reads: what the values that it takes are called there, in the region's order.
        weights: what has been copied to that device before; takes what is copied now.
    """
    old, new = region.graph, fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    names = iter(reads)
    for node in old.nodes:
        if node.op == "placeholder":
            made[node] = new.placeholder(next(names))
        else:
            made[node] = new.node_copy(node, made.__getitem__)
            made[node].args = _moved_arguments(made[node].args, device)
            made[node].kwargs = _moved_arguments(made[node].kwargs, device)
        made[node].meta = dict(node.meta)
        if "val" in node.meta:
            made[node].meta["val"] = on_device(node.meta["val"], device)
    constants = {
        name: replace(constant, tensor=_copied(constant, device, weights))
        for name, constant in old.constants.items()
    }
    module = fx.GraphModule({name: constant.tensor for name, constant in constants.items()}, new)
    graph = Graph(module, constants, (), old.in_spec, old.out_spec, old.fake_mode)
    return Region(region.name, graph, tuple(reads), region.writes)


def _moved_arguments(given: Any, device: torch.device) -> Any:
    """Arguments of a call, another device in the place of each."""
    return fx.node.map_aggregate(given, lambda leaf: device if isinstance(leaf, torch.device) else leaf)


def _copied(constant: Constant, device: torch.device, weights: Weights) -> torch.Tensor:
    """A constant on a device, the same for all regions there."""
    tensor = constant.tensor.detach()
    key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if key not in weights:
        weights[key] = tensor.to(device)
    return weights[key]


def on_device(val: Any, device: torch.device) -> Any:
    """A fake value as it is on a device; a size stays as it is."""
    return pytree.tree_map_only(torch.Tensor, lambda leaf: _fake(leaf, device), val)


def _fake(val: Any, device: torch.device) -> torch.Tensor:
    mode: FakeTensorMode = val.fake_mode
    with mode:
        return torch.empty_strided(val.size(), val.stride(), dtype=val.dtype, device=device)
