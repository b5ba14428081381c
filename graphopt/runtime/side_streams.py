"""A region's calls on several streams, while a CUDA graph is captured: its branches run side by side then.

The other streams branch off from the current one by an event, and join it by events at the end. In between a
call waits, by an event, for the calls of other streams that it reads from. Two things need care:

- **Memory.** PyTorch's allocator gives memory that is free again to later calls of the stream that it was
  allocated on, at once: they run behind all that was queued there. It knows nothing of another stream that
  still reads it. So what a call reads of another stream's memory is held until that stream has waited for
  the call, itself or by way of others (``Arrangement.knows``), or to the end, where all have joined. Memory
  is told by its address, so that views count as what they are views of. In a capture this is exact, and
  ``record_stream`` is not: it would keep the memory from being used again until the capture has ended.
- **Dependent launches.** A kernel that is launched with PDL may start when the one before it on its stream
  lets it go, and ``kernels/_triton.py`` has it wait for that one alone. The first kernel behind an edge from
  another stream is launched without.

cuBLAS keeps a workspace by stream, which must lie in the graph's memory: captures have streams of their own
(see ``kernels/_driver.py``), and the run ahead of a capture has others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.compiler.cost import VIEWS, milliseconds, node_cost, node_dtype
from graphopt.compiler.device import Limits
from graphopt.errors import said
from graphopt.ir.graph import Graph, is_getitem, is_symbolic, tensor_bytes
from graphopt.kernels._driver import own_stream
from graphopt.kernels._replay import captured, replayed
from graphopt.kernels._triton import Edge, behind_edge
from graphopt.runtime.scheduling.branches import MOST_STREAMS, WORTH, Arrangement, Call

_RESULTS_A_PROCESSOR = 8192  # that a streaming multiprocessor works on at a time: half a tile of 128 x 128
_SHORTEST_S = 2e-6  # of a call with a kernel
_OF_ROOFLINE = 0.5  # that a call reaches which was not measured
_ROUNDS = 7  # half the replays of each graph in a comparison

_beside: ContextVar[bool] = ContextVar("graphopt_side_streams", default=False)


@contextlib.contextmanager
def side_streams() -> Iterator[None]:
    """Let regions inside the block use several streams: captures, and the run ahead of one."""
    token = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(token)


def calls_of(graph: Graph, measured: Mapping[str, float], limits: Limits) -> list[Call]:
    """A region's calls with what each takes, and how much of the GPU it keeps busy.

    A call fills as many processors as its results need, at 8192 each, and at least the share of its time
    that the roofline wants of the whole GPU.

    Args:
        graph: the region's.
        measured: microseconds by node, for those that were measured; others are estimated.
        limits: of the GPU.
    """
    calls = []
    for node in graph.calls:
        reads = tuple(source.name for source in node.all_input_nodes if source.op == "call_function")
        if is_getitem(node) or is_symbolic(node) or node.target in VIEWS:
            calls.append(Call(node.name, 0.0, 0.0, reads))
            continue
        least = 1e-3 * milliseconds(node_cost(node), limits, node_dtype(node))
        seconds = 1e-6 * measured.get(node.name, 0.0) or max(least / _OF_ROOFLINE, _SHORTEST_S)
        width = torch.finfo(node_dtype(node)).bits / 8
        results = tensor_bytes(node.meta["val"]) / width
        filled = results / (_RESULTS_A_PROCESSOR * max(limits.processors, 1))
        calls.append(Call(node.name, seconds, min(1.0, max(filled, least / seconds)), reads))
    return calls


class SideStreams:
    """A function of tensors, on several streams inside of ``side_streams()``, else on the current one.

    Args:
        module: runs the calls in order.
        arrangement: of its calls.
        nodes: the module's calls by their names in the arrangement.
        device: a GPU.
        captured_on: the other streams of captures, for those of which no graph outlives a comparison; by
            default new ones.
        cuda: ``torch.cuda``.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        arrangement: Arrangement,
        nodes: Mapping[str, fx.Node],
        device: torch.device,
        captured_on: Sequence[Any] = (),
        cuda: Any = torch.cuda,
    ) -> None:
        self.module = module
        self.arrangement = arrangement
        self.nodes = nodes
        self.awaited = {name for waits in arrangement.waits.values() for name in waits}
        self.frees = _last_uses([nodes[name] for name in arrangement.order])
        self.cuda = cuda
        self._device = device
        self._captured_on = captured_on
        self._sides: dict[bool, list[Any]] = {}

    def __call__(self, *inputs: torch.Tensor) -> Sequence[Any]:
        """Run; work queued on the current stream later comes after all of it."""
        if not _beside.get():
            results: Sequence[Any] = self.module(*inputs)
            return results
        current = self.cuda.current_stream(self._device)
        sides = self._streams()
        begun = current.record_event()
        for side in sides:
            side.wait_event(begun)
        run = _Run(self, [current, *sides], inputs)
        try:
            for name in self.arrangement.order:
                run.call(name)
        finally:  # a capture cannot end before all have joined
            for side in sides:
                current.wait_stream(side)
        return run.outputs()

    def _streams(self) -> list[Any]:
        """The other streams; all are made ahead of the first capture."""
        if not self._sides:
            count = self.arrangement.streams - 1
            self._sides[False] = [self.cuda.Stream(self._device) for _ in range(count)]
            given = list(self._captured_on[:count])
            self._sides[True] = given or [own_stream(self._device) for _ in range(count)]
        return self._sides[bool(self.cuda.is_current_stream_capturing())]


@dataclass(frozen=True)
class Beside:
    """Whether a region's branches run side by side, and why.

    Args:
        streams: how many they would run on.
        us: measured microseconds on these streams, and on one.
        failed: why they cannot, in words.
    """

    streams: int
    us: tuple[float, float]
    failed: str = ""

    @property
    def pays(self) -> bool:
        """Whether they do."""
        return not self.failed and self.us[0] <= WORTH * self.us[1]

    @property
    def reason(self) -> str:
        """In words, for a remark."""
        if self.failed:
            return f"branches run one after the other: {self.failed}"
        taken = f"{self.us[0]:.1f} us on {self.streams} streams, {self.us[1]:.1f} us on one"
        return f"branches run {'side by side' if self.pays else 'one after the other'}: {taken}"


def compared(beside: SideStreams, inputs: Sequence[torch.Tensor], device: torch.device) -> Beside:
    """A region as one CUDA graph with side streams and one without, replayed in turn.

    Both launch the same kernels, so that their results are the same to the last bit; where they are not, for
    whatever reason, branches stay in order.

    Args:
        beside: the region.
        inputs: real ones, on the device, which is the current one.
        device: a GPU.
    """
    streams = _for_comparisons(torch.cuda.current_device())
    on_them = SideStreams(beside.module, beside.arrangement, beside.nodes, device, streams[1:])
    runs = [functools.partial(run, *inputs) for run in (on_them, beside.module)]
    try:
        for run in runs:  # kernels compile now
            run()
        torch.cuda.synchronize(device)
        graphs, results = zip(*(captured([run], streams[0]) for run in runs), strict=True)
        times = replayed(graphs, _ROUNDS)
        failed = "" if all(map(_same, *map(pytree.tree_leaves, results))) else "the results differ"
    except Exception as error:  # whatever the driver or a library says: one stream serves
        times, failed = [0.0, 0.0], said(error).splitlines()[0]
    return Beside(beside.arrangement.streams, (times[0], times[1]), failed)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    return bool(torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


@functools.cache
def _for_comparisons(index: int) -> list[Any]:
    """The streams of a GPU that comparisons are captured on."""
    return [own_stream(torch.device("cuda", index)) for _ in range(MOST_STREAMS)]


class _Run:
    """One run: the values of now, where their memory is from, and what is held for other streams."""

    def __init__(self, region: SideStreams, streams: Sequence[Any], inputs: Sequence[torch.Tensor]) -> None:
        self._region, self._streams = region, streams
        self._interpreter = fx.Interpreter(region.module, garbage_collect_values=False)
        self._values = self._interpreter.env
        self._home: dict[fx.Node, dict[int, int]] = {}  # by node and address, the stream that allocated it
        self._held: list[list[tuple[int, int, Any]]] = [[] for _ in streams]
        self._edges = [Edge(pending=stream > 0) for stream in range(len(streams))]
        self._events: dict[str, Any] = {}
        given = iter(inputs)
        for node in region.module.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = next(given)
            elif node.op == "get_attr":
                self._values[node] = self._interpreter.fetch_attr(str(node.target))

    def call(self, name: str) -> None:
        """Queue one call on its stream."""
        region, arrangement, node = self._region, self._region.arrangement, self._region.nodes[name]
        number, knows = arrangement.stream[name], arrangement.knows[name]
        stream, edge = self._streams[number], self._edges[number]
        for awaited in arrangement.waits[name]:
            stream.wait_event(self._events[awaited])
            edge.pending = True
        self._held[number] = [entry for entry in self._held[number] if knows[entry[1]] < entry[0]]
        with region.cuda.stream(stream), behind_edge(edge):
            self._values[node] = self._interpreter.run_node(node)
        if name in region.awaited:
            self._events[name] = stream.record_event()
        self._note(node, number, knows[number])
        for dead in region.frees.get(node, ()):
            del self._values[dead]
            self._home.pop(dead, None)

    def outputs(self) -> Sequence[Any]:
        """What the graph returns."""
        (ends,) = self._region.module.graph.find_nodes(op="output")
        results: Sequence[Any] = fx.map_arg(ends.args[0], lambda node: self._values[node])
        return results

    def _note(self, node: fx.Node, number: int, place: int) -> None:
        """Where the memory of a call's results is from; what it reads of another stream's is held."""
        known: dict[int, int] = {}
        for source in node.all_input_nodes:
            homes = self._home.get(source, {})
            known.update(homes)
            for home in {home for home in homes.values() if home != number}:
                self._held[home].append((place, number, self._values[source]))
        given = {address for source in node.all_input_nodes for address in _addresses(self._values[source])}
        self._home[node] = {
            address: known.get(address, number)
            for address in _addresses(self._values[node])
            if address in known or address not in given
        }


def _addresses(value: Any) -> set[int]:
    """Of the memory that a value's tensors are views of."""
    leaves = pytree.tree_leaves(value)
    return {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor)}


def _last_uses(order: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By call, the values of other calls that nobody needs once it is queued."""
    last: dict[fx.Node, fx.Node] = {}
    for node in order:
        last[node] = node
        for source in node.all_input_nodes:
            if source.op == "call_function":
                last[source] = node
    frees: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        if all(reader.op != "output" for reader in node.users):
            frees.setdefault(user, []).append(node)
    return frees
