"""ONNX Runtime on a GPU: by stand-ins what is bound, captured and let go of; on a GPU whether it is right."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graphopt
from graphopt import OrtOptions, Target
from graphopt.capture.export import capture_any
from graphopt.errors import ExecutionError, LoweringError
from graphopt.runtime.executors.ort import cuda
from graphopt.runtime.executors.ort.placement import Placement
from graphopt.runtime.executors.ort.providers import CUDA, TENSORRT, Provider
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.region import Region, extract
from tests._models import FAMILIES, MLP, randn, randomised
from tests.runtime.test_cuda import agrees, mlp, on_gpu

HOST = torch.device("cpu")  # the stand-in for a GPU


class Stream:
    """A stream that keeps a record of what it waits for."""

    made: list[Stream]

    def __init__(self, device: torch.device | None = None) -> None:
        self.cuda_stream, self.waited, self.synchronized = 77, [], 0

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    def synchronize(self) -> None:
        self.synchronized += 1


class StandIn:
    """A session that runs the region in PyTorch on what was bound, at the addresses that were bound.

    Attributes:
        last: the newest one.
        refuses: the reason why sessions with CUDA graphs are refused.
        host: inputs are read on the CPU.
        fails: the next run raises.
    """

    last: StandIn
    refuses: str | None = None
    host = False
    fails = False

    def __init__(self, model: Any, provider: Provider, options: OrtOptions) -> None:
        self.entry = dict(provider.entries()[0][1])
        if self.refuses is not None and self.entry.get("enable_cuda_graph") == "1":
            raise LoweringError(self.refuses)
        self.provider, self.reads_on_host = provider.name, self.host
        self.placement = Placement()
        self.runs: list[str | None] = []
        self.released: list[int] = []
        StandIn.last = self

    def binding(self) -> Any:
        return SimpleNamespace()

    def bind(self, binding: Any, inputs: Sequence[Any], outputs: Sequence[Any], device: Any) -> list[Any]:
        binding.inputs, binding.outputs = list(inputs), list(outputs)
        return list(inputs)

    def run(self, binding: Any, outputs: Sequence[Any], options: Any = None) -> list[Any]:
        if self.fails:
            raise ExecutionError("ONNX Runtime failed in the middle of a run")
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        try:
            self.runs.append(options.get_run_config_entry("gpu_graph_id"))
        except RuntimeError:
            self.runs.append(None)
        with torch.no_grad():
            made = self.function(*binding.inputs)
        return [m if o is None else o.copy_(m) for o, m in zip(outputs, made, strict=True)]

    def release_graph(self, identity: int) -> None:
        self.released.append(identity)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Programs made inside run in the stand-in, on the CPU."""
    caller = Stream()
    monkeypatch.setattr(cuda, "Session", StandIn)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: caller)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda what: nullcontext())
    for name, value in (("refuses", None), ("host", False), ("fails", False)):
        monkeypatch.setattr(StandIn, name, value)
    return StandIn


def region_of(dynamic: Any = None) -> Region:
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None, dynamic=dynamic)
    return extract(graph, graph.calls, "region0")


def program_of(dynamic: Any = None, provider: str = CUDA) -> cuda.OrtCudaProgram:
    region = region_of(dynamic)
    made = Provider(provider, {"device_id": "0"})
    StandIn.function = staticmethod(region.graph.module.forward)
    region.graph.module.recompile()
    return cuda.OrtCudaProgram(region, to_onnx(region.graph), made, HOST, OrtOptions())


BATCH = {"x": {0: "batch"}}


def right(program: cuda.OrtCudaProgram, *batches: int) -> list[torch.Tensor]:
    """Run batches, each compared with the model; returns what the program gave."""
    found = []
    for seed, batch in enumerate(batches):
        x = randn(8, batch, seed=seed).t()
        (got,) = program.run([x])
        torch.testing.assert_close(got, randomised(MLP())(x).detach())
        found.append(got)
    return found


# Stand-ins


def test_the_session_has_a_stream_of_its_own_that_joins_the_callers(stand_in: type[StandIn]) -> None:
    program = program_of()
    assert StandIn.last.entry == {"device_id": "0", "user_compute_stream": "77", "enable_cuda_graph": "1"}
    right(program, 4)
    mine, caller = program._stream, torch.cuda.current_stream()
    assert mine.waited == [caller]
    assert caller.waited == [mine]
    assert mine.synchronized == 0


def test_a_fixed_shape_is_captured_from_the_second_run_on(stand_in: type[StandIn]) -> None:
    program = program_of()
    first, second, third = right(program, 4, 4, 4)
    assert StandIn.last.runs == ["-1", "1", "1"]
    assert len({first.data_ptr(), second.data_ptr(), third.data_ptr()}) == 3
    row = program.describe()
    assert (row["cuda_graphs"], row["cuda_graphs_dropped"]) == (1, 0)
    assert row["graphed_nodes"] == len(program._region.graph.calls)
    assert program.notes() == []


def test_a_graph_always_reads_and_writes_the_same_memory(stand_in: type[StandIn]) -> None:
    program = program_of()
    right(program, 4)
    (captured,) = program._buckets.values()
    places = [x.data_ptr() for x in (*captured.inputs, *captured.outputs)]
    right(program, 4, 4)
    assert places == [x.data_ptr() for x in (*captured.binding.inputs, *captured.binding.outputs)]
    assert captured.inputs[0].is_contiguous()


def test_every_shape_has_an_identity_of_its_own_and_the_oldest_makes_room(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_GRAPHS", 2)
    program = program_of(BATCH)
    right(program, 4, 4, 5, 5, 5)  # the first is captured at once, another when it comes again
    assert StandIn.last.runs == ["-1", "1", "-1", "-1", "2"]
    right(program, 6, 6, 6)
    assert StandIn.last.released == [1]
    assert StandIn.last.runs[-1] == "3"
    right(program, 5)
    assert StandIn.last.runs[-1] == "2"
    assert program.describe()["cuda_graphs_dropped"] == 1


def test_where_graphs_are_refused_kernels_are_launched_one_by_one(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "refuses", "not all nodes are on CUDA")
    program = program_of()
    assert "enable_cuda_graph" not in StandIn.last.entry
    right(program, 4, 4, 4)
    assert StandIn.last.runs == [None] * 3
    (note,) = program.notes()
    assert note.reason == "no CUDA graph: not all nodes are on CUDA"
    assert program.describe()["graphed_nodes"] == 0


def test_an_input_that_the_cpu_reads_is_waited_for(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime copies it when it is bound: from a graph's memory it would be that of the last call."""
    monkeypatch.setattr(StandIn, "host", True)
    program = program_of()
    assert program.failure == "a node on the CPU reads an input"
    assert "enable_cuda_graph" not in StandIn.last.entry
    right(program, 4, 4)
    assert program._stream.synchronized == 2


def test_tensorrt_keeps_its_graphs_to_itself(stand_in: type[StandIn]) -> None:
    program = program_of(provider=TENSORRT)
    assert program.failure == f"{TENSORRT} keeps its own"
    assert StandIn.last.entry == {"device_id": "0", "user_compute_stream": "77"}
    right(program, 4, 4)


def test_outputs_that_onnx_runtime_allocates_are_copied(stand_in: type[StandIn]) -> None:
    program = program_of(BATCH)
    found = right(program, 4)
    again = right(program, 4)
    assert found[0].data_ptr() != again[0].data_ptr()


def test_after_a_failure_the_streams_are_joined_and_the_next_call_is_right(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of()
    right(program, 4, 4)
    monkeypatch.setattr(StandIn, "fails", True)
    with pytest.raises(ExecutionError, match="in the middle of a run"):
        program.run([randn(4, 8)])
    assert torch.cuda.current_stream().waited[-1] is program._stream
    monkeypatch.setattr(StandIn, "fails", False)
    right(program, 4)


# A GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_model_is_as_exact_as_before_on_a_gpu(family: str) -> None:
    example = on_gpu(FAMILIES[family](), torch.float16)
    opt = graphopt.optimize(example.model, example.args, example.kwargs, executors=("ort", "cuda", "eager"))
    assert "ort" in {row["executor"] for row in opt.report.plan}
    for _ in range(4):  # launched, captured, replayed
        agrees(example, opt, *example.args, **example.kwargs)


@pytest.mark.gpu
def test_it_is_a_candidate_on_a_gpu() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args)
    assert "ort" in [row.name for row in opt.report.candidates]


@pytest.mark.gpu
def test_a_dynamic_model_is_captured_shape_by_shape() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, dynamic=example.dynamic, executors=("ort",))
    for batch in (4, 5, 5, 5, 4, 3, 5, 0):
        agrees(example, opt, randn(batch, 8, seed=batch).cuda())
    (row,) = opt.plan.rows()
    assert row["cuda_graphs"] == 2
    assert row["providers"] == {CUDA: sum(row["providers"].values())}


@pytest.mark.gpu
def test_calls_follow_the_callers_stream_and_the_host_waits_for_nothing() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, executors=("ort",))
    x = example.args[0]
    for _ in range(3):
        opt(x)
    stream, late = torch.cuda.Stream(), torch.empty_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)  # the input is written long after the call is queued
        found = opt(late)
        assert not stream.query()
        copy = found.clone()
    stream.synchronize()
    torch.testing.assert_close(copy, opt(x))


@pytest.mark.gpu
def test_results_of_older_calls_stay_and_threads_do_not_mix() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, executors=("ort",))
    inputs = [randn(4, 8, seed=seed).cuda() for seed in range(8)]
    with torch.no_grad():
        wanted = [example.model(x) for x in inputs]
    found: dict[int, torch.Tensor] = {}

    def serve(place: int) -> None:
        for _ in range(20):
            found[place] = opt(inputs[place])

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for place, value in enumerate(wanted):
        torch.testing.assert_close(found[place], value, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_options_of_the_provider_reach_it() -> None:
    example = on_gpu(mlp())
    options = OrtOptions(provider_options={"arena_extend_strategy": "kSameAsRequested"})
    target = Target(torch.device("cuda:0"), ort=options)
    opt = graphopt.optimize(example.model, example.args, target=target, executors=("ort",))
    session = opt.plan.steps[0].program._session._session
    assert session.get_provider_options()[CUDA]["arena_extend_strategy"] == "kSameAsRequested"
