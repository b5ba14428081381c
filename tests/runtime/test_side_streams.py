"""Branches on side streams: what waits for what, and that no memory is given away while it is still read."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt.capture.export import capture_any
from graphopt.compiler.compare import compare
from graphopt.compiler.device import GPUS
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.kernels import _triton
from graphopt.kernels._triton import Edge, behind_edge, dependence
from graphopt.runtime import side_streams as module
from graphopt.runtime.cuda_graph import CudaGraphs
from graphopt.runtime.executors import cuda as executor
from graphopt.runtime.scheduling.branches import Call, arranged, on_streams
from graphopt.runtime.side_streams import Beside, SideStreams, calls_of, side_streams
from tests._models import randn, randomised

CPU = torch.device("cpu")


class Event:
    """What was queued on a stream when it was recorded."""

    def __init__(self, ahead: set[int]) -> None:
        self.ahead = ahead


class Stream:
    """A stream that knows what its next call comes behind of: numbers of calls."""

    def __init__(self, cuda: Cuda) -> None:
        self.ahead: set[int] = set()
        self._cuda = cuda

    def record_event(self) -> Event:
        return Event(set(self.ahead))

    def wait_event(self, event: Event) -> None:
        self.ahead |= event.ahead

    def wait_stream(self, stream: Stream) -> None:
        self.ahead |= stream.ahead
        self._cuda.joined = True


class Cuda:
    """What is used of ``torch.cuda``; ``now`` is the stream that calls are queued on."""

    def __init__(self, capturing: bool = False) -> None:
        self.now = self.caller = Stream(self)
        self.capturing, self.joined = capturing, False
        self.made: list[Stream] = []

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802
        self.made.append(Stream(self))
        return self.made[-1]

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Memory:
    """Of one result: the stream that allocated it, and the numbers of the calls that wrote and read it."""

    def __init__(self, stream: Stream, written: int) -> None:
        self.stream, self.written = stream, written
        self.readers: set[int] = set()


class Watch:
    """Calls that know on which stream they are queued, and see when their memory is given back.

    Whatever is queued next on the stream that allocated it may get it then, so that all that have read it
    must be ahead of that: but for the end, where the streams have joined.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.count = cuda, 0
        self.memory: dict[int, Memory] = {}
        self.faults: list[str] = []

    def work(self, *xs: torch.Tensor) -> torch.Tensor:
        self.count += 1
        stream, number = self.cuda.now, self.count
        for x in xs:
            read = self.memory.get(x.untyped_storage().data_ptr())
            if read is None:
                continue  # an input
            if read.written not in stream.ahead:
                self.faults.append(f"call {number} does not wait for call {read.written}")
            read.readers.add(number)
        array = np.full(64, float(number))
        made = torch.from_numpy(array)
        memory = self.memory[made.untyped_storage().data_ptr()] = Memory(stream, number)
        weakref.finalize(array, self._freed, memory)
        stream.ahead.add(number)
        return made

    def view(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(8, 8)

    def _freed(self, memory: Memory) -> None:
        still = memory.readers - memory.stream.ahead
        if still and not self.cuda.joined:
            who = f"while {sorted(still)} may read it"
            self.faults.append(f"the memory of call {memory.written} is free {who}")


def region(watch: Watch, reads: Sequence[Sequence[int]], views: Sequence[bool]) -> fx.GraphModule:
    """Calls that read those before them by number, or the input; the last of all is returned."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for places, is_view in zip(reads, views, strict=True):
        sources = [nodes[place] for place in places] or nodes[:1]
        nodes.append(
            graph.call_function(watch.view, (sources[0],))
            if is_view
            else graph.call_function(watch.work, tuple(sources))
        )
    graph.output((nodes[-1],))
    return fx.GraphModule(nn.Module(), graph)


def placed(made: fx.GraphModule, streams: Sequence[int], cuda: Cuda, own: bool = True) -> SideStreams:
    calls = [node for node in made.graph.nodes if node.op == "call_function"]
    given = [
        Call(node.name, 1e-6, 0.1, tuple(s.name for s in node.all_input_nodes if s.op == "call_function"))
        for node in calls
    ]
    stream = {node.name: number for node, number in zip(calls, streams, strict=True)}
    arrangement = on_streams(given, stream, [node.name for node in calls])
    captured_on = [Stream(cuda) for _ in range(arrangement.streams - 1)] if own else []
    return SideStreams(made, arrangement, {node.name: node for node in calls}, CPU, captured_on, cuda)


def faults(reads: Sequence[Sequence[int]], views: Sequence[bool], streams: Sequence[int]) -> list[str]:
    """What goes wrong when the calls are run on these streams."""
    cuda = Cuda()
    watch = Watch(cuda)
    run = placed(region(watch, reads, views), streams, cuda)
    with side_streams():
        run(torch.zeros(64))
    assert watch.count == len(views) - sum(views)
    if watch.count:
        assert cuda.caller.ahead == set(range(1, watch.count + 1))  # all have joined
    return watch.faults


# x -> 1 on stream 0; 2 reads it on stream 1; 3 and 4 go on on stream 0, where 1's memory may be used again.
FORK = ([[], [1], [1], [3], [2, 4]], [False] * 5, [0, 1, 0, 0, 0])


def test_what_another_stream_reads_is_held_until_it_has_been_waited_for() -> None:
    assert faults(*FORK) == []


def test_without_that_its_memory_would_be_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Run, "_note", lambda *args: None)
    assert "the memory of call 1 is free while [2] may read it" in faults(*FORK)


def test_a_view_on_another_stream_counts_as_what_it_is_of() -> None:
    reads = [[], [1], [2], [1], [4], [3, 5]]
    assert faults(reads, [False, True, *[False] * 4], [0, 1, 1, 0, 0, 0]) == []


@hypothesis.given(st.data())
def test_any_calls_on_any_streams_are_safe(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 14))
    nearby = [st.integers(max(0, index - 4), index) for index in range(count)]
    reads = [data.draw(st.lists(places, max_size=3, unique=True)) for places in nearby]
    views = [data.draw(st.integers(0, 3)) == 0 for _ in range(count)]
    streams = [data.draw(st.integers(0, 2)) for _ in range(count)]
    assert faults(reads, views, streams) == []


def test_outside_of_captures_all_runs_on_the_current_stream() -> None:
    cuda = Cuda()
    run = placed(region(Watch(cuda), *FORK[:2]), FORK[2], cuda)
    (result,) = run(torch.zeros(64))
    assert float(result[0]) == 5.0
    assert not cuda.made


def test_captures_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which the run ahead of them leaves no workspace of cuBLAS."""
    cuda = Cuda()
    monkeypatch.setattr(module, "own_stream", lambda device: Stream(cuda))
    run = placed(region(Watch(cuda), *FORK[:2]), FORK[2], cuda, own=False)
    with side_streams():
        (ahead,), (own,) = run._streams(), _captured(run, cuda)
    assert ahead is not own
    assert (run._streams()[0], _captured(run, cuda)[0]) == (own, own)
    given = Stream(cuda)
    made = region(Watch(cuda), *FORK[:2])
    other = SideStreams(made, run.arrangement, run.nodes, CPU, [given], cuda)
    assert _captured(other, cuda) == [given]


def _captured(run: SideStreams, cuda: Cuda) -> list[Any]:
    cuda.capturing = True
    return run._streams()


def test_a_failure_leaves_no_stream_that_has_not_joined() -> None:
    cuda = Cuda()
    made = region(Watch(cuda), *FORK[:2])
    run = placed(made, FORK[2], cuda)
    made.graph.find_nodes(op="call_function", target=list(run.nodes.values())[-1].target)[-1].target = _fails
    with side_streams(), pytest.raises(RuntimeError, match="no memory"):
        run(torch.zeros(64))
    assert cuda.joined


def _fails(*_: Any) -> Any:
    raise RuntimeError("no memory")


def test_the_first_kernel_behind_an_edge_is_no_dependent_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "capability", lambda device: (9, 0))
    edge = Edge(pending=True)
    with behind_edge(edge):
        assert [dependence(CPU, []) for _ in range(3)] == [0, 1, 1]
        edge.pending = True  # the stream has come to wait again
    with behind_edge(edge):
        assert dependence(CPU, []) == 0
    with behind_edge(Edge()):
        assert dependence(CPU, []) == 1


class Towers(nn.Module):
    """Two towers of one shape, whose results meet."""

    def __init__(self, features: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Sequential(*(nn.Sequential(nn.Linear(features, features), nn.GELU()) for _ in range(depth)))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.one(x) * self.two(y)).sum(-1)


def test_two_towers_are_two_branches() -> None:
    graph, _ = capture_any(randomised(Towers()), (randn(4, 256), randn(4, 256)))
    calls = calls_of(graph, {}, GPUS["h100"])
    assert all(0 <= call.share <= 0.05 for call in calls)
    assert arranged(calls).streams == 2
    large, _ = capture_any(randomised(Towers()), (randn(8192, 256), randn(8192, 256)))
    assert arranged(calls_of(large, {}, GPUS["h100"])).streams == 1


def test_measured_times_are_taken_for_estimated_ones() -> None:
    graph, _ = capture_any(randomised(Towers(depth=1)), (randn(4, 256), randn(4, 256)))
    name = graph.calls[0].name
    assert calls_of(graph, {name: 7.5}, GPUS["h100"])[0].seconds == pytest.approx(7.5e-6)


def test_side_by_side_must_pay() -> None:
    assert Beside(2, (9.0, 10.0)).pays
    assert Beside(2, (9.0, 10.0)).reason == "branches run side by side: 9.0 us on 2 streams, 10.0 us on one"
    assert not Beside(2, (9.9, 10.0)).pays
    assert Beside(2, (0.0, 0.0), "no memory").reason == "branches run one after the other: no memory"
    assert not Beside(2, (0.0, 0.0), "no memory").pays


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_towers_on_a_gpu_are_right_in_every_replay(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "compared", lambda *args: Beside(2, (1.0, 2.0)))  # whatever pays today
    model = randomised(Towers(depth=4)).cuda().to(dtype)
    inputs = [tuple(randn(4, 256, seed=2 * turn + k).cuda().to(dtype) for k in (0, 1)) for turn in range(20)]
    opt = graphopt.optimize(model, inputs[0], executors=("cuda",), require_cuda_graph=True)
    assert opt.report.cuda_graphs is not None
    assert opt.report.cuda_graphs["streams"] == 2
    assert any("side by side" in row.reason for row in opt.report.remarks)
    first = [opt(*given) for given in inputs]
    double = copy.deepcopy(model).double()
    for given, mine in zip(inputs, first, strict=True):
        with torch.no_grad():
            exact, own = double(*(x.double() for x in given)), model(*given)
        verdict = compare([own], [mine], [exact], MODEL_FLOOR_ULPS)
        assert verdict.ok, verdict.reason
    for turn in range(200):
        assert torch.equal(opt(*inputs[turn % 20]), first[turn % 20])


@pytest.mark.parametrize("fault", ["", "the results differ", "no memory"])
def test_a_comparison_keeps_branches_in_order_for_any_fault(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda()
    run = placed(region(Watch(cuda), *FORK[:2]), FORK[2], cuda)
    ends = iter([torch.ones(2), torch.full((2,), 2.0 if fault == "the results differ" else 1.0)])

    def captured(calls: Any, stream: Any) -> Any:
        if fault == "no memory":
            raise RuntimeError(fault)
        return "a graph", [[next(ends)]]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(module, "_for_comparisons", lambda index: [None, None])
    monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(module, "replayed", lambda graphs, rounds: [5.0, 10.0])
    found = module.compared(run, [torch.zeros(64)], CPU)
    assert found.pays is (fault == "")
    assert found.failed.endswith(fault)


@pytest.mark.gpu
def test_memory_is_used_again_and_results_stay_right() -> None:
    """Large values that die early, on both streams, in one pool of memory."""

    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, z = x * 2, x + 1
            for _ in range(8):
                y, z = torch.sin(y.flip(0)), torch.cos(z.flip(0))
            return y + z + x

    x = randn(4096, 1024).cuda()
    graph, inputs = capture_any(Wide().eval(), (x,))
    calls = list(graph.calls)
    given = [
        Call(node.name, 1e-5, 0.1, tuple(s.name for s in node.all_input_nodes if s.op == "call_function"))
        for node in calls
    ]
    on = {call.name: index % 2 for index, call in enumerate(given)}  # as many edges as there can be
    arrangement = on_streams(given, on, [call.name for call in given])
    run = SideStreams(graph.module, arrangement, {node.name: node for node in calls}, x.device)
    graphs = CudaGraphs(x.device)
    captured = graphs.capture(run, inputs, side_streams())
    expected = Wide()(x)
    for _ in range(50):
        assert torch.equal(captured.replay([x])[0], expected)
    assert graphs.bytes() < 16 * x.nbytes  # of 34 values
