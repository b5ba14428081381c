"""The peers' modes on a GPU, without one: torch.cuda, ONNX Runtime and NVML are fakes."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from graphopt.bench import onnx_peers, own_peers
from graphopt.bench.peer import Problem
from graphopt.bench.peers import PEERS
from graphopt.bench.torch_peers import eager_modes, inductor_modes
from graphopt.errors import LoweringError
from graphopt.kernels import _replay
from graphopt.observe import energy

GPU = torch.device("cuda", 1)
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A problem that says it is on a GPU; its tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    model = torch.nn.Linear(4, 3).eval()
    (tmp_path / "plain.onnx").touch()  # the export is there
    return Problem(model, (torch.randn(2, 4),), {}, GPU, tmp_path)


class Graph:
    """A CUDA graph of functions: capturing runs them, a replay runs them again into the same memory."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    made: list[Graph] = []

    @contextlib.contextmanager
    def graph(captured: Graph, stream: Any) -> Iterator[None]:
        made.append(captured)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: GPU.index)
    monkeypatch.setattr(_replay, "own_stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made


def test_eager_runs_also_as_one_cuda_graph_that_was_warm(problem: Problem, captures: list[Graph]) -> None:
    calls = []
    problem.model.register_forward_hook(lambda *_: calls.append(len(captures)))
    plain, graphed = eager_modes(problem)
    assert (plain.name, graphed.name) == ("", "CUDA graph")
    run = graphed.build(problem)
    assert calls == [0, 0, 0, 1]  # three before the capture, one in it
    wanted = problem.model(*problem.args)
    calls.clear()
    first, again = run(), run()
    assert captures[0].replays == 2
    assert first[0] is again[0] and torch.equal(first[0], wanted)  # the graph's own memory
    assert calls == []


def test_inductor_runs_in_cuda_graphs_with_frozen_weights_and_without(problem: Problem) -> None:
    names = [mode.name for mode in inductor_modes(problem)]
    assert names == ["reduce-overhead", "max-autotune", "max-autotune, frozen"]


def test_onnx_runtime_is_tried_with_and_without_a_cuda_graph(problem: Problem, tmp_path: Path) -> None:
    assert [mode.name for mode in onnx_peers.onnxruntime_modes(problem)] == ["", "CUDA graph"]
    config = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    known = Problem(BertModel(config), (), {}, GPU, tmp_path)
    assert [mode.name for mode in onnx_peers.onnxruntime_modes(known)] == [
        "",
        "transformers optimizer",
        "CUDA graph",
        "transformers optimizer, CUDA graph",
    ]


class Session:
    """ONNX Runtime's session, which gets the providers that it is asked for, and always the CPU's."""

    without: tuple[str, ...] = ()
    made: list[Session]

    def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, Any]]]) -> None:
        self.path, self.providers, self.bound, self.ran = path, dict(providers), [], []
        type(self).made.append(self)

    def get_providers(self) -> list[str]:
        return [*(name for name in self.providers if name not in self.without), CPU]

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="y")]

    def io_binding(self) -> Any:
        return SimpleNamespace(
            bind_input=lambda *place: self.bound.append(place),
            bind_output=lambda *place: self.bound.append(place),
        )

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.ran.append(options.get_run_config_entry("disable_synchronize_execution_providers"))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    monkeypatch.setattr(Session, "made", [], raising=False)
    monkeypatch.setattr(onnx_peers.onnxruntime, "InferenceSession", Session)
    return Session.made


@pytest.mark.parametrize(("place", "graph"), [(0, None), (1, "1")], ids=["launches", "graph"])
def test_a_session_runs_on_the_callers_stream_in_the_models_precision_and_waits_for_nothing(
    problem: Problem, sessions: list[Session], place: int, graph: str | None
) -> None:
    run = onnx_peers.onnxruntime_modes(problem)[place].build(problem)
    (session,) = sessions
    options = session.providers[CUDA]
    assert (options["device_id"], options["user_compute_stream"], options["use_tf32"]) == ("1", "1234", "0")
    assert options.get("enable_cuda_graph") == graph
    results = run()
    assert session.ran == ["1", "1"]  # once to warm up
    assert [row[0] for row in session.bound] == ["x", "y"]
    assert session.bound[1][-1] == results[0].data_ptr()


def test_what_tensorrt_does_not_take_stays_on_the_gpu(problem: Problem, sessions: list[Session]) -> None:
    onnx_peers.tensorrt_provider(problem)
    assert list(sessions[0].providers) == [TENSORRT, CUDA]
    assert sessions[0].providers[TENSORRT]["trt_cuda_graph_enable"] == "1"
    assert not {"trt_fp16_enable", "trt_bf16_enable"} & sessions[0].providers[TENSORRT].keys()
    half = Problem(problem.model.half(), (torch.randn(2, 4).half(),), {}, GPU, problem.folder)
    onnx_peers.tensorrt_provider(half)
    assert sessions[1].providers[TENSORRT]["trt_fp16_enable"] == "1"


@pytest.mark.parametrize(
    ("without", "build", "words"),
    [
        ((CUDA,), lambda p: onnx_peers.onnxruntime_modes(p)[0].build(p), f"{CUDA} .* falls back to {CPU}"),
        ((TENSORRT,), onnx_peers.tensorrt_provider, f"{TENSORRT} .* falls back to {CUDA}"),
    ],
    ids=["cuda", "tensorrt"],
)
def test_a_provider_that_does_not_load_is_no_measurement(
    problem: Problem,
    sessions: list[Session],
    monkeypatch: pytest.MonkeyPatch,
    without: tuple[str, ...],
    build: Any,
    words: str,
) -> None:
    monkeypatch.setattr(Session, "without", without)
    with pytest.raises(LoweringError, match=words):
        build(problem)
    assert sessions[0].ran == []


def test_graphopts_export_runs_as_the_peers_export_does(problem: Problem, sessions: list[Session]) -> None:
    (problem.folder / "graphopt.onnx").touch()  # the export is there
    run_by_graphopt, export, graphed = PEERS["graphopt-ort"].modes(problem)
    assert (run_by_graphopt.name, export.name, graphed.name) == ("", "export", "export, CUDA graph")
    export.build(problem), graphed.build(problem)
    assert [session.path for session in sessions] == [str(problem.folder / "graphopt.onnx")] * 2
    assert [session.providers[CUDA].get("enable_cuda_graph") for session in sessions] == [None, "1"]


def test_what_onnx_runtime_does_not_run_whole_is_not_measured_as_its_time(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"executor": "ort"}, {"executor": "eager"}]
    made = SimpleNamespace(plan=SimpleNamespace(rows=lambda: rows))
    monkeypatch.setattr(own_peers.graphopt, "optimize", lambda *args, **kwargs: made)
    with pytest.raises(LoweringError, match="a part of the model runs on eager"):
        PEERS["graphopt-ort"].modes(problem)[0].build(problem)


def test_on_a_gpu_the_missing_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CPU])
    assert PEERS["onnxruntime"].absent(GPU) == "this ONNX Runtime has no CUDA provider"
    assert PEERS["graphopt-ort"].absent(GPU) == "this ONNX Runtime has no CUDA provider"
    assert PEERS["openvino"].absent(GPU) == "runs on the CPU only"
    assert PEERS["eager"].absent(GPU) is None


class NVML:
    """A GPU's counter in millijoules, and who asked for what in which order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.millijoules = 5000.0

    def nvmlInit(self) -> None:  # noqa: N802  (NVML's own name, as those below)
        self.order.append("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.order.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:  # noqa: N802
        assert handle == "handle"
        self.order.append("read")
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> NVML:
    made = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.order.append(f"wait for {device}"))
    return made


def test_joules_count_all_that_was_launched(nvml: NVML) -> None:
    """Calls on a GPU return before the work is done: the counter is read when the GPU has finished."""
    counter = energy.counter(GPU)
    assert counter is not None
    assert nvml.order == ["init", "GPU-ab-cd", "read"]
    nvml.order.clear()
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        nvml.millijoules += 250.0

    assert counter.joules(run, seconds=0.01) == pytest.approx(0.25)
    assert calls > 0
    assert nvml.order == ["wait for cuda:1", "read"] * 2


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_that_does_not_count_is_none(nvml: NVML, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("not supported")

    monkeypatch.setattr(NVML, broken, fail)
    assert energy.counter(GPU) is None
    monkeypatch.setattr(importlib, "import_module", fail)
    assert energy.counter(GPU) is None
