"""Providers: what the installed ONNX Runtime has, what of it loads here, and which options each is given."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch

from graphopt.errors import TargetError, said
from graphopt.runtime.target import Target

_SUFFIX = "ExecutionProvider"
CPU, CUDA, TENSORRT = (f"{name}{_SUFFIX}" for name in ("CPU", "CUDA", "Tensorrt"))
OPENVINO = f"OpenVINO{_SUFFIX}"
_CONFIG = "load_config"  # its option that holds all others, as JSON


@dataclass(frozen=True)
class Provider:
    """What a session runs on.

    Args:
        name: as ONNX Runtime calls it.
        options: for it.
        devices: a plugin's, as ONNX Runtime found them; () for a provider of the installed build.
        followed_by: providers that take what it refuses, before the CPU does.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[Any, ...] = ()
    followed_by: tuple[Provider, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """True when its tensors are on a CUDA device."""
        return self.name in (CUDA, TENSORRT)

    def given(self, **options: str) -> Provider:
        """The same with more options, for it and for those that follow it, where each has such an option."""
        mine = {name: value for name, value in options.items() if _has_option(self.name, name)}
        others = tuple(other.given(**options) for other in self.followed_by)
        return replace(self, options={**self.options, **mine}, followed_by=others)

    def with_threads(self, threads: int) -> Provider:
        """The same with so many threads, where it is OpenVINO, which has some of its own."""
        if _CONFIG not in self.options:
            return self
        config = json.loads(self.options[_CONFIG])
        config["CPU"]["INFERENCE_NUM_THREADS"] = str(threads)
        return replace(self, options={**self.options, _CONFIG: json.dumps(config)})

    def entries(self) -> list[tuple[str, dict[str, str]]]:
        """As ``InferenceSession`` takes it: itself, those that follow it, and the CPU; [] for a plugin."""
        if self.devices:
            return []
        chain = [self, *self.followed_by]
        if self.name != CPU:
            chain.append(Provider(CPU))
        return [(provider.name, dict(provider.options)) for provider in chain]


def _has_option(provider: str, name: str) -> bool:
    return name != "enable_cuda_graph" or provider == CUDA


# The installed build


def provider_for(target: Target) -> Provider:
    """The provider of the ``ort`` executor for a target; whether it loads, ``problem`` says.

    Raises:
        TargetError: the build has no such provider, or it does not run where the target is.
    """
    options = target.ort
    if _short(options.provider or "") == _short(OPENVINO):
        return _openvino(target)
    name = find(options.provider or target.device.type)
    on_gpu = name in (CUDA, TENSORRT)
    if on_gpu != (target.device.type == "cuda"):
        raise TargetError(
            f"{name} does not run on {target}", hint="move the model, or leave OrtOptions(provider=...) out"
        )
    device = {"device_id": str(target.device.index or 0)} if on_gpu else {}
    followed = (Provider(CUDA, device),) if name == TENSORRT else ()
    given = {key: str(value) for key, value in options.provider_options.items()}
    return Provider(name, {**device, **given}, followed_by=followed)


def find(short: str) -> str:
    """The full name of a provider of the installed build: "cuda" is "CUDAExecutionProvider".

    Raises:
        TargetError: the build does not have it.
    """
    names: list[str] = onnxruntime.get_available_providers()
    built = {_short(name): name for name in names}
    wanted = _short(short)
    if wanted not in built:
        install = "install onnxruntime-gpu, or " if wanted in ("cuda", "tensorrt") else ""
        raise TargetError(
            f"ONNX Runtime {onnxruntime.__version__} here has no provider {short!r}",
            hint=f"{install}one of: {', '.join(sorted(built))}",
        )
    return built[wanted]


def _short(name: str) -> str:
    return name.removesuffix(_SUFFIX).lower()


@functools.cache
def problem(name: str, device_id: str = "0") -> str | None:
    """Why a provider of the installed build does not load here, in words; None when it does.

    A provider whose libraries are broken is left out by ONNX Runtime without an error: the session then runs
    on the CPU. So one is opened, and asked.
    """
    if name == CPU:
        return None
    reason = _library_problem(name)
    if reason is not None:
        return f"{name} does not load: {reason}"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    given = {"device_id": device_id} if name in (CUDA, TENSORRT) else {}
    try:
        session = onnxruntime.InferenceSession(
            _smallest_model(), options, providers=[(name, given)], enable_fallback=0
        )
    except Exception as error:  # what the provider's own libraries raise
        return f"{name} does not load: {said(error).splitlines()[0]}"
    if name not in session.get_providers():
        return f"{name} does not load: ONNX Runtime falls back to the CPU"
    return None


def _library_problem(name: str) -> str | None:
    """What the loader says of a provider's library: which other one is missing, or of another version.

    ONNX Runtime only logs it. None when it loads, or when the provider is no library of its own.
    """
    folder = Path(onnxruntime.__file__).parent / "capi"
    library = folder / f"libonnxruntime_providers_{_short(name)}.so"
    if not sys.platform.startswith("linux") or not library.exists():
        return None
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def _smallest_model() -> bytes:
    made = ir.node("Identity", [ir.val("x", ir.DataType.FLOAT, [1])])
    made.outputs[0].name, made.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    inputs = [value for value in made.inputs if value is not None]
    graph = ir.Graph(inputs, made.outputs, nodes=[made], opset_imports={"": 17}, name="smallest")
    serialized: bytes = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    return serialized


# Plugins

_PLUGIN = "onnxruntime_ep_openvino"
_REGISTERING = threading.Lock()


def _openvino(target: Target) -> Provider:
    """OpenVINO on the CPU, as a plugin that is registered when it is first asked for.

    It computes in float32, unless the options for the provider ask for another ``INFERENCE_PRECISION_HINT``.

    Raises:
        TargetError: the plugin is not installed, or does not load, or the target is no CPU.
    """
    if target.device.type != "cpu":
        raise TargetError(f"OpenVINO runs on the CPU, the target is {target}")
    config = {**openvino_options("f32", torch_threads(target)), **target.ort.provider_options}
    given = {name: str(value) for name, value in config.items()}
    return Provider(OPENVINO, {_CONFIG: json.dumps({"CPU": given})}, _openvino_devices())


def openvino_options(precision: str, threads: int, group: int = 0) -> dict[str, Any]:
    """What OpenVINO is asked for, by its own names: exactness, which it gives up for speed when left alone.

    Args:
        precision: that it computes in, "f32" or "bf16".
        threads: that share a node.
        group: of what is multiplied by weights in 8 bits or fewer, so many numbers get one step; 0 for none.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }


def plugin_is_installed() -> bool:
    """True when OpenVINO's plugin can be found; whether it loads is found out when it is asked for."""
    return importlib.util.find_spec(_PLUGIN) is not None


@functools.cache
def _openvino_devices() -> tuple[Any, ...]:
    """The plugin's devices that are a CPU.

    Raises:
        TargetError: there are none, with the reason.
    """
    try:
        plugin = importlib.import_module(_PLUGIN)
    except ImportError:
        raise TargetError(
            "OpenVINO's provider is not installed", hint="pip install 'graphopt[openvino]'"
        ) from None
    try:
        with _REGISTERING:
            if not _devices_of(OPENVINO):  # whoever registers it second is refused
                onnxruntime.register_execution_provider_library(OPENVINO, plugin.get_library_path())
        found = [device for device in _devices_of(OPENVINO) if _is_cpu(device)]
    except Exception as error:  # the loader's, and what the plugin raises
        raise TargetError(f"OpenVINO's provider does not load: {said(error).splitlines()[0]}") from error
    if not found:
        raise TargetError("OpenVINO's provider does not load: it finds no CPU that it can use")
    return tuple(found[:1])


def _devices_of(provider: str) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]


def _is_cpu(device: Any) -> bool:
    return bool(device.device.type == onnxruntime.OrtHardwareDeviceType.CPU)


def torch_threads(target: Target) -> int:
    """Threads that share one node: what the user says, or as many as PyTorch uses."""
    return target.ort.intra_op_threads or torch.get_num_threads()
