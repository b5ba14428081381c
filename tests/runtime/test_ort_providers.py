"""Which provider serves a target, and what is said of one that is not there or does not load."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from graphopt import OrtOptions, Target
from graphopt.capture.export import capture_any
from graphopt.compiler.device import device_limits
from graphopt.compiler.remarks import Remarks
from graphopt.errors import TargetError
from graphopt.runtime import ways
from graphopt.runtime.executors import EXECUTORS, absent
from graphopt.runtime.executors.ort import providers
from graphopt.runtime.executors.ort.providers import CPU, CUDA, OPENVINO, TENSORRT, Provider
from tests._models import MLP, randn, randomised

HOST, GPU = Target(torch.device("cpu")), Target(torch.device("cuda:1"))
BUILT = [TENSORRT, CUDA, CPU]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What loads here is found out once a process: each test asks again."""
    for known in (providers.problem, providers._openvino_devices):
        known.cache_clear()
    yield
    for known in (providers.problem, providers._openvino_devices):
        known.cache_clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Says which providers the installed build has."""
    return lambda names: monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)


class Opened:
    """A session of ONNX Runtime, as far as it is asked for its providers."""

    loads = True

    def __init__(self, model: Any, options: Any, providers: Any, enable_fallback: int) -> None:
        assert enable_fallback == 0  # the fall-back prints to the user's terminal
        self.names = [name for name, _ in providers] if self.loads else []

    def get_providers(self) -> list[str]:
        return [*self.names, CPU]


# Choice


def test_each_device_has_its_own_provider(built: Any) -> None:
    built(BUILT)
    assert providers.provider_for(HOST).entries() == [(CPU, {})]
    found = providers.provider_for(GPU)
    assert (found.name, found.on_gpu) == (CUDA, True)
    assert found.entries() == [(CUDA, {"device_id": "1"}), (CPU, {})]


def test_a_provider_that_is_asked_for_is_taken_with_its_options(built: Any) -> None:
    built(BUILT)
    options = OrtOptions(provider="TensorRT", provider_options={"trt_fp16_enable": True})
    found = providers.provider_for(Target(GPU.device, ort=options))
    assert found.entries() == [
        (TENSORRT, {"device_id": "1", "trt_fp16_enable": "1"}),
        (CUDA, {"device_id": "1"}),  # takes what TensorRT refuses
        (CPU, {}),
    ]


def test_more_options_go_to_every_provider_that_has_them(built: Any) -> None:
    built(BUILT)
    target = Target(GPU.device, ort=OrtOptions(provider="tensorrt"))
    first, second, _ = (
        providers.provider_for(target).given(user_compute_stream="5", enable_cuda_graph="1").entries()
    )
    assert first == (TENSORRT, {"device_id": "1", "user_compute_stream": "5"})
    assert second == (CUDA, {"device_id": "1", "user_compute_stream": "5", "enable_cuda_graph": "1"})


def test_a_build_without_cuda_says_what_to_install(built: Any) -> None:
    built([CPU])
    with pytest.raises(TargetError, match=r"has no provider 'cuda'\s+try: install onnxruntime-gpu.*cpu"):
        providers.provider_for(GPU)


@pytest.mark.parametrize(("target", "name"), [(HOST, "cuda"), (GPU, "cpu")])
def test_a_provider_of_another_device_is_refused(built: Any, target: Target, name: str) -> None:
    built(BUILT)
    with pytest.raises(TargetError, match=f"does not run on {target.device}"):
        providers.provider_for(Target(target.device, ort=OrtOptions(provider=name)))


# What loads


def test_a_broken_library_is_named(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **_: Any) -> None:
        if path.endswith("_cuda.so"):
            raise OSError("libcublasLt.so.13: cannot open shared object file")

    built(BUILT)
    monkeypatch.setattr(providers.sys, "platform", "linux")
    monkeypatch.setattr(providers.Path, "exists", lambda self: True)
    monkeypatch.setattr(ctypes, "CDLL", load)
    said = absent(EXECUTORS["ort"], GPU)
    assert said == f"{CUDA} does not load: libcublasLt.so.13: cannot open shared object file"


def test_a_provider_that_onnx_runtime_leaves_out_is_seen(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built(BUILT)
    monkeypatch.setattr(providers, "_library_problem", lambda name: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Opened)
    assert absent(EXECUTORS["ort"], GPU) is None
    providers.problem.cache_clear()
    monkeypatch.setattr(Opened, "loads", False)
    assert absent(EXECUTORS["ort"], GPU) == f"{CUDA} does not load: ONNX Runtime falls back to the CPU"


def test_a_provider_that_raises_is_seen(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error 35\nmore")

    built(BUILT)
    monkeypatch.setattr(providers, "_library_problem", lambda name: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    assert absent(EXECUTORS["ort"], GPU) == f"{CUDA} does not load: RuntimeError: CUDA error 35"


def test_the_cpu_is_always_there() -> None:
    assert absent(EXECUTORS["ort"], HOST) is None
    assert absent(EXECUTORS["eager"], GPU) is None


# Candidates


def test_insisting_on_a_provider_that_does_not_load_is_one_error(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(BUILT)
    monkeypatch.setattr(providers, "problem", lambda *_: f"{CUDA} does not load: no libcudnn.so.9")
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None)
    with pytest.raises(TargetError, match=r"no executor .* runs on cuda:1: ort: .*no libcudnn.so.9"):
        ways.plan_candidates(graph, graph, ("ort",), GPU, Remarks())


def test_a_provider_that_does_not_load_is_otherwise_one_remark(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built([CPU])
    monkeypatch.setattr(Target, "limits", property(lambda self: device_limits(HOST.device)))
    graph, _ = capture_any(randomised(MLP()), (randn(4, 8),), None)
    remarks = Remarks()
    found = ways.plan_candidates(graph, graph, ("ort", "eager"), GPU, remarks)
    assert [step.executor for step in found[0].plan.steps] == ["eager"]
    (said,) = (row.reason for row in remarks.rows if "no candidate" in row.reason)
    assert said.startswith("ort is no candidate: ONNX Runtime")


# OpenVINO


class Plugin:
    """What the plugin's package offers."""

    @staticmethod
    def get_library_path() -> str:
        return "/plugin/library.so"


def device(name: str = OPENVINO, kind: Any = onnxruntime.OrtHardwareDeviceType.CPU) -> Any:
    return SimpleNamespace(ep_name=name, device=SimpleNamespace(type=kind))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plugin's devices, which ONNX Runtime finds once its library is registered."""
    found: list[Any] = []
    registered: list[str] = []

    def register(name: str, path: str) -> None:
        assert (name, path) == (OPENVINO, "/plugin/library.so")
        assert not registered
        registered.append(name)

    monkeypatch.setattr(providers.importlib, "import_module", lambda name: Plugin)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: found if registered else [device(CPU)])
    return found


def through_plugin(**options: Any) -> Target:
    return Target(HOST.device, ort=OrtOptions(provider="OpenVINO", **options))


def test_the_plugin_is_told_precision_and_threads(plugin: list[Any]) -> None:
    plugin += [device("OpenVINOExecutionProvider.AUTO"), device()]
    for given, precision in (({}, "f32"), ({"INFERENCE_PRECISION_HINT": "bf16"}, "bf16")):
        provider = providers.provider_for(through_plugin(provider_options=given))
        config = json.loads(provider.options["load_config"])["CPU"]
        assert config["INFERENCE_PRECISION_HINT"] == precision
        assert config["INFERENCE_NUM_THREADS"] == str(torch.get_num_threads())
        assert config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"  # else it rounds beside weights in 8 bits
        assert provider.devices == (plugin[1],)
        assert provider.entries() == []  # a plugin is handed over by its devices
    threads = providers.provider_for(through_plugin(intra_op_threads=7)).options
    assert json.loads(threads["load_config"])["CPU"]["INFERENCE_NUM_THREADS"] == "7"


def test_a_plugin_without_a_cpu_of_its_own_is_absent(plugin: list[Any]) -> None:
    plugin.append(device(kind=onnxruntime.OrtHardwareDeviceType.GPU))
    assert "finds no CPU that it can use" in str(absent(EXECUTORS["ort"], through_plugin()))


def test_a_plugin_that_does_not_load_is_absent(plugin: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, path: str) -> None:
        raise RuntimeError("libtbb.so.12 is missing")

    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", fail)
    reason = str(absent(EXECUTORS["ort"], through_plugin()))
    assert "does not load: RuntimeError: libtbb.so.12 is missing" in reason


def test_a_plugin_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(providers.importlib, "import_module", fail)
    assert "pip install 'graphopt[openvino]'" in str(absent(EXECUTORS["ort"], through_plugin()))


def test_a_providers_entries_hold_copies() -> None:
    provider = Provider(CUDA, {"device_id": "0"})
    provider.entries()[0][1]["device_id"] = "3"
    assert provider.options == {"device_id": "0"}
