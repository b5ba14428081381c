"""A region as a session of ONNX Runtime, on tensors of the CPU."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphopt.runtime.executors._protocol import KernelTime, Note
from graphopt.runtime.executors._remade import Remade
from graphopt.runtime.executors.ort import placement
from graphopt.runtime.executors.ort.providers import CPU, Provider
from graphopt.runtime.executors.ort.session import Session
from graphopt.runtime.ort_options import OrtOptions
from graphopt.runtime.region import Region

_KERNEL = "_kernel_time"  # how ONNX Runtime's profile marks a kernel
_PROFILED_RUNS = 3
_FUSED = re.compile(r"(\w+)ExecutionProvider_\d+_(\d+)")  # what it calls the parts of a plugin


class OrtProgram:
    """A region as an ONNX Runtime session.

    Args:
        region: the region.
        model: the region in ONNX.
        provider: what it runs on.
        options: the user's.

    Raises:
        LoweringError: ONNX Runtime refuses the region.
    """

    def __init__(
        self, region: Region, model: ir.Model, provider: Provider, options: OrtOptions | None = None
    ) -> None:
        self.model = model
        self._region, self._provider = region, provider
        self._options = options or OrtOptions()
        self._own_threads = torch.get_num_threads()
        self._outputs = [(node.meta["val"].dtype, fixed_shape(node)) for node in region.results]
        self._times: list[KernelTime] | None = None
        self._profiled, self._recording = 0, threading.Lock()
        self._opened = Remade(self._open)
        self._fallbacks = self._session.placement.fallbacks(model, provider)

    def _open(self) -> Session:
        self._profiled = 0
        return Session(self.model, self._provider, self._options, profiled=self._times is None)

    @property
    def _session(self) -> Session:
        return self._opened.get()

    def rest(self) -> None:
        """Close the session, and with it ONNX Runtime's packed weights, until the next run opens another."""
        self._opened.drop()

    @property
    def provider(self) -> str:
        """The provider that the session runs on; those that it could not have are not named."""
        return self._session.provider

    @property
    def threads(self) -> int:
        """How many share a node, the caller's own counted."""
        return self._options.intra_op_threads or self._own_threads

    def with_threads(self, threads: int) -> OrtProgram:
        """The same in a session of so many threads at most; itself where it has no more.

        The session's threads begin where this one is allowed to run.
        """
        if threads >= self.threads:
            return self
        options = replace(self._options, intra_op_threads=threads)
        return OrtProgram(self._region, self.model, self._provider.with_threads(threads), options)

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the session on CPU tensors; returns fresh tensors.

        Raises:
            ExecutionError: ONNX Runtime fails.
        """
        session = self._session
        binding = session.binding()
        results = [
            None if shape is None else torch.empty(shape, dtype=dtype) for dtype, shape in self._outputs
        ]
        kept = session.bind(binding, inputs, results, _HOST)
        made = session.run(binding, results)
        del kept
        if self._times is None:
            self._record(session)
        return made

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run, and tell what the session's own profile of its first runs says."""
        results = self.run(inputs)
        while self._times is None:
            results = self.run(inputs)
        return results, self._times

    def describe(self) -> dict[str, Any]:
        """The provider, and where it is not the CPU alone, who runs how many nodes, and why."""
        return described(self._session, self._fallbacks)

    def notes(self) -> list[Note]:
        """Each node that the CPU runs instead of the provider, and why."""
        return fallback_notes(self._region, self._fallbacks)

    def _record(self, session: Session) -> None:
        """Read the session's profile after its first runs, and switch profiling off for all others."""
        with self._recording:
            self._profiled += 1
            if self._profiled == _PROFILED_RUNS:
                events = json.loads(session.end_profiling())
                parts = session.placement.of(session.provider)
                self._times = _kernel_times(events, self.model, parts)


_HOST = torch.device("cpu")


def described(session: Session, fallbacks: list[placement.Fallback]) -> dict[str, Any]:
    """What the plan's row says of a session."""
    row: dict[str, Any] = {"provider": session.provider}
    if session.provider != CPU:
        row["providers"] = session.placement.counts()
        row["fallbacks"] = list(placement.told(fallbacks))
    return row


def fallback_notes(region: Region, fallbacks: list[placement.Fallback]) -> list[Note]:
    """A remark for every node of a region that has a part on the CPU."""
    nodes = {node.name: node for node in region.graph.calls}
    notes = []
    for name, found in placement.by_node(fallbacks).items():
        node = nodes.get(name, region.graph.calls[0])
        reasons = sorted({f"{fallback.op} runs on the CPU: {fallback.reason}" for fallback in found})
        notes.append(Note("missed", node, "; ".join(reasons)))
    return notes


def fixed_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value; None where a size is dynamic."""
    shape = tuple(node.meta["val"].shape)
    return shape if all(isinstance(size, int) for size in shape) else None


def _kernel_times(
    events: Sequence[dict[str, Any]], model: ir.Model, parts: Sequence[Sequence[placement.Placed]]
) -> list[KernelTime]:
    """Mean time a node over the recorded runs, the first left out: it allocates.

    Args:
        events: of ONNX Runtime's profile.
        model: whose nodes name ours.
        parts: what a plugin runs as one kernel each, in its order; such a kernel has its first node's name.
    """
    ours = {node.name or "": node.metadata_props.get("graphopt.node", "") for node in model.graph}
    rows: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            op_type = event.get("args", {}).get("op_name", "")
            rows.setdefault(name.removesuffix(_KERNEL), (op_type, []))[1].append(event["dur"] / 1e3)
    return [
        KernelTime(*_named(name, op_type, ours, parts), sum(times[1:]) / max(len(times) - 1, 1))
        for name, (op_type, times) in rows.items()
    ]


def _named(
    name: str, op_type: str, ours: Mapping[str, str], parts: Sequence[Sequence[placement.Placed]]
) -> tuple[str, str]:
    """The node that a kernel serves, and what ran."""
    fused = _FUSED.fullmatch(op_type)
    if fused and name not in ours and int(fused[2]) < len(parts):
        nodes = parts[int(fused[2])]
        served = [ours[node.name] for node in nodes if ours.get(node.name)]
        return (served[0] if served else name), f"{fused[1]} x{len(nodes)}"
    return ours.get(name) or name, op_type
