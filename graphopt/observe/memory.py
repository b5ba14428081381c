"""Memory: by accounting, from shapes and lifetimes alone, and as it is measured.

What is accounted is the same on every machine and in every run, so that a change of it is a change of the
model.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler_legacy

from graphopt.ir import provenance
from graphopt.ir.graph import Constant, Graph, op_name
from graphopt.observe.snapshot import tensors_of
from graphopt.runtime import scheduler
from graphopt.runtime.memory import lay_out, most_alive, peak_bytes, values_of
from graphopt.runtime.plan import Plan

# By accounting


def account(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Bytes of constants, of the values alive at the worst moment, and what the largest of these is.

    Args:
        graphs: the regions of a plan in order, or one whole graph; values are told apart by their names.

    Returns:
        Bytes: ``weights`` (the model's own), ``folded`` (constants made at compile time), ``activations``
        (the most that is alive at once), ``peak`` (constants and activations); and the ``largest``
        activation, in words.
    """
    constants = {name: constant for graph in graphs for name, constant in graph.constants.items()}
    held = unique_bytes(constants.values())
    folded = unique_bytes(constant for constant in constants.values() if constant.how)
    values = values_of(graphs)
    alive = most_alive(values)
    activations = sum(value.bytes for value in alive)
    return {
        "weights": held - folded,
        "folded": folded,
        "activations": activations,
        "peak": held + activations,
        "largest": _words(graphs, max(alive, key=lambda value: value.bytes).name) if alive else "",
    }


def unique_bytes(constants: Iterable[Constant]) -> int:
    """Bytes of constants, what shares memory counted once."""
    storages = {}
    for constant in constants:
        storage = constant.tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _words(graphs: Sequence[Graph], name: str) -> str:
    node = next(node for graph in graphs for node in graph.calls if node.name == name)
    return f"{op_name(node)} of {tensors_of(node)} at {provenance.of(node).module or 'the model itself'}"


# As it is measured


def memory_of(
    captured: Graph, plan: Plan, before: Plan | None, inputs: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """What the report says of memory, in bytes: of the captured model, of the plan, and of the process.

    Args:
        captured: the graph as captured.
        plan: what runs.
        before: the captured graph in PyTorch, to be measured; None where it is not there.
        inputs: the example inputs: flat tensors. Each plan runs once on them.

    Returns:
        ``weights`` and ``folded``; ``before`` and ``after``, each as ``account`` has it, with ``block`` (what
        holds all activations where they share one block: see runtime/memory.py), ``measured``
        (the most that PyTorch's allocator held of a call, blocks that are kept included) and ``workspace``
        (what that is above the activations), None where they are not known: ONNX Runtime allocates by itself;
        and ``peak_rss``, the process's resident memory at its largest.
    """
    regions = [step.region.graph for step in plan.steps]
    now = account(regions)
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return {
        "weights": now["weights"],
        "folded": now["folded"],
        "before": {**account([captured]), **_in_one_block([captured]), **_measured(before, inputs)},
        "after": {**now, **_in_one_block(regions), **_measured(plan, inputs)},
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
    }


def _in_one_block(graphs: Sequence[Graph]) -> dict[str, int]:
    return {"block": lay_out(values_of(graphs)).bytes}


_UNSEEN = ("ort", "openvino")  # they allocate by themselves, and PyTorch does not see it


def _measured(plan: Plan | None, inputs: Sequence[torch.Tensor]) -> dict[str, int | None]:
    if plan is None or any(step.executor in _UNSEEN for step in plan.steps):
        return {"measured": None, "workspace": None}
    kept = sum(step.program.describe().get("block_bytes", 0) for step in plan.steps)
    found = allocated(lambda: scheduler.run(plan, inputs), plan.device)
    if found is None:
        return {"measured": None, "workspace": None}
    activations = peak_bytes([step.region.graph for step in plan.steps])
    return {"measured": found + kept, "workspace": max(0, found + kept - activations)}


def allocated(run: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that PyTorch's allocator held at once in a call, above what it held before it.

    Args:
        run: the call.
        device: whose memory.

    Returns:
        The bytes; None where somebody else is profiling, which PyTorch allows once at a time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - held)
    if torch._C._autograd._profiler_enabled():
        return None
    with _Allocations() as seen:
        kept = run()  # what is returned is still held at the end
    del kept
    most: int = seen.most
    return most


class _Allocations(profiler_legacy.profile):
    """What PyTorch's allocator for the CPU hands out in the block.

    The older of PyTorch's two profilers: the newer one writes to stderr whenever it starts. Its own parser
    adds the bytes up by op, so that the moment is lost; here its records are read one by one.

    Attributes:
        most: the most bytes at once, above what was there before.
    """

    def __init__(self) -> None:
        super().__init__(profile_memory=True)  # type: ignore[no-untyped-call]
        self.most = 0

    def __exit__(self, *_: object) -> None:
        threads: Any = torch._C._autograd._disable_profiler_legacy()
        records = [record for thread in threads for record in thread]
        start = records[0]
        changes = [record for record in records if record.kind() == "memory_alloc"]
        now = 0
        for record in sorted(changes, key=start.cpu_elapsed_us):
            now += record.cpu_memory_usage()
            self.most = max(self.most, now)


class PeakMemory:
    """The most resident memory that the process holds inside the block, over its start, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        start = resident_bytes()

        def watch() -> None:
            while not self._done.wait(0.005):
                self.peak = max(self.peak, resident_bytes() - start)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def resident_bytes() -> int:
    """Resident memory of this process, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
