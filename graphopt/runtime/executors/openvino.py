"""The ``openvino`` executor: a region compiled by OpenVINO, on the CPU.

Where OpenVINO itself is installed it reads the region as ONNX and runs it, on any processor that it knows.
Where only its plugin for ONNX Runtime is installed, the region is a session of that, on Intel's processors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir
import torch
from torch import fx

from graphopt.errors import ExecutionError, InputError, LoweringError, said
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import argument
from graphopt.ir.tuning import tuned_for
from graphopt.kernels.block_quantized_linear import OP as BLOCK_QUANTIZED_LINEAR
from graphopt.kernels.dynamic_quantized_linear import OP as DYNAMIC_QUANTIZED_LINEAR
from graphopt.runtime.executors._protocol import KernelTime, Program, Silent
from graphopt.runtime.executors._remade import Remade
from graphopt.runtime.executors.ort import Ort, inexpressible
from graphopt.runtime.executors.ort.program import fixed_shape
from graphopt.runtime.executors.ort.providers import openvino_options, plugin_is_installed, torch_threads
from graphopt.runtime.executors.ort.weights import collect, large, without_weights
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.onnx_translation import quiet
from graphopt.runtime.region import Region
from graphopt.runtime.target import Target

Precision = Literal["f32", "bf16"]

Output = tuple[torch.dtype, tuple[int, ...] | None]  # its type, and its shape where that is fixed

_PROFILED_RUNS = 3
_COPIED_BYTES = 2**16  # 4 us
_LARGEST_GROUP = 256
# The "file" of what lies in the process's memory: ONNX Runtime's provider calls it so to OpenVINO's reader.
_MEMORY = "*/_ORT_MEM_ADDR_/*"


@dataclass(frozen=True)
class Settings:
    """What OpenVINO is asked for.

    Args:
        precision: that it computes in.
        threads: that share a node.
        group: of what is multiplied by weights in 8 bits or fewer, so many numbers get one step; 0 for none.
    """

    precision: Precision
    threads: int
    group: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The same by OpenVINO's names."""
        return openvino_options(self.precision, self.threads, self.group)


class OpenVinoProgram(Silent):
    """A region as a model of OpenVINO's.

    Args:
        region: the region.
        model: the region in ONNX.
        settings: what is asked for.
        trusted: OpenVINO is known not to fall over the model.

    Raises:
        LoweringError: OpenVINO refuses the region, or does not compute in that precision here.
    """

    provider = "OpenVINO"

    def __init__(self, region: Region, model: ir.Model, settings: Settings, *, trusted: bool = False) -> None:
        if not trusted:
            _try_elsewhere(model, settings.options)
        self.model = model
        self.settings = settings
        self._region = region
        self._outputs = [(node.meta["val"].dtype, fixed_shape(node)) for node in region.results]
        self._compiled = Remade(lambda: _Compiled(model, settings))

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run on CPU tensors; returns fresh tensors.

        Raises:
            ExecutionError: OpenVINO fails.
        """
        return self._compiled.get().run(inputs, self._outputs)

    def rest(self) -> None:
        """Let go of the compiled model, and with it of packed weights, until the next run."""
        self._compiled.drop()

    def with_threads(self, threads: int) -> OpenVinoProgram:
        """The same with so many threads at most; itself where it has no more."""
        if threads >= self.settings.threads:
            return self
        fewer = replace(self.settings, threads=threads)
        return OpenVinoProgram(self._region, self.model, fewer, trusted=True)

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run, and tell what OpenVINO counts of each node in a model that is compiled to be counted."""
        self.rest()  # one copy of the weights at a time
        compiled = _Compiled(self.model, self.settings, counted=True)
        ours = {node.name or "": node.metadata_props.get("graphopt.node", "") for node in self.model.graph}
        rows: dict[str, tuple[str, float]] = {}
        for _ in range(_PROFILED_RUNS):
            compiled.run(inputs, self._outputs)
            for name, kind, ms in compiled.counts():
                before = rows.get(name, (kind, float("inf")))[1]
                rows[name] = kind, min(before, ms)
        del compiled
        times = [KernelTime(ours.get(name) or name, kind, ms) for name, (kind, ms) in rows.items()]
        return self.run(inputs), times

    def describe(self) -> dict[str, Any]:
        """What runs it, and in which precision."""
        return {"provider": self.provider, "precision": self.settings.precision}


class _Compiled:
    """What OpenVINO has made, with packed weights of its own.

    Args:
        model: in ONNX.
        settings: what is asked for.
        counted: it counts what each node takes.

    Raises:
        LoweringError: OpenVINO refuses the model, or computes in another precision.
    """

    def __init__(self, model: ir.Model, settings: Settings, *, counted: bool = False) -> None:
        # Weights are read, by kernels that do not pack them at every call, where the model has them.
        self._weights = collect(model, {name for name, _, _ in large(model)}).shared
        text = without_weights(model, lambda name: (_MEMORY, self._weights[name].value.data_ptr()))
        options = {**settings.options, "PERF_COUNT": counted}
        try:
            core = _core()
            self._model = core.compile_model(core.read_model(text), "CPU", options)
            given = self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        except Exception as error:
            raise LoweringError(f"OpenVINO refuses the region: {_last_line(error)}") from error
        if given != settings.precision:
            wanted = settings.precision
            raise LoweringError(f"OpenVINO computes in {given} on this processor, not in {wanted}")
        self._idle: deque[_Request] = deque()  # a call takes one, and gives it back for the next

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[Output]) -> list[torch.Tensor]:
        """Run; returns fresh tensors.

        Raises:
            ExecutionError: OpenVINO fails.
        """
        try:
            request = self._idle.pop()
        except IndexError:
            request = _Request(self._model)
        try:
            results = request.run(inputs, outputs)
        except Exception as error:
            raise ExecutionError(f"OpenVINO failed in the middle of a run: {_last_line(error)}") from error
        self._idle.append(request)
        return results

    def counts(self) -> list[tuple[str, str, float]]:
        """Name, kind and milliseconds of each node of the last run."""
        return self._idle[-1].counts()


class _Request:
    """One call at a time of a compiled model.

    Small inputs and outputs are copied from and to memory of its own: another address for one of them costs
    OpenVINO 80 us (MiniLM 1x16, of 3.0 ms). Large ones are read and written where they are.

    Args:
        model: compiled.
    """

    def __init__(self, model: Any) -> None:
        self._request = made = model.create_infer_request()
        self._inputs = [_own(port, made.get_input_tensor, at) for at, port in enumerate(model.inputs)]
        self._outputs = [_own(port, made.get_output_tensor, at) for at, port in enumerate(model.outputs)]

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[Output]) -> list[torch.Tensor]:
        """Run; returns fresh tensors."""
        held = []  # the request knows addresses alone: what is written out here must live until it has run
        for place, (tensor, own) in enumerate(zip(inputs, self._inputs, strict=True)):
            if own is not None:
                own.copy_(tensor.detach())
            else:
                held.append(tensor.detach().resolve_neg().contiguous())
                self._request.set_input_tensor(place, _over(held[-1]))
        results: list[torch.Tensor | None] = []
        for place, ((dtype, shape), own) in enumerate(zip(outputs, self._outputs, strict=True)):
            written = torch.empty(shape, dtype=dtype) if own is None and shape is not None else None
            if written is not None:
                self._request.set_output_tensor(place, _over(written))
            results.append(written)
        self._request.infer()
        del held
        return [self._made(place) if result is None else result for place, result in enumerate(results)]

    def counts(self) -> list[tuple[str, str, float]]:
        """Name, kind and milliseconds of each node of the last run."""
        rows = self._request.profiling_info
        return [(row.node_name, row.node_type, row.real_time.total_seconds() * 1e3) for row in rows]

    def _made(self, place: int) -> torch.Tensor:
        own = self._outputs[place]
        return (_view(self._request.get_output_tensor(place)) if own is None else own).clone()


def _own(port: Any, tensor_at: Callable[[int], Any], place: int) -> torch.Tensor | None:
    """A request's own memory for a small input or output of a fixed size; None for any other."""
    if port.partial_shape.is_dynamic or port.tensor.size > _COPIED_BYTES:
        return None
    return _view(tensor_at(place))


def _view(tensor: Any) -> torch.Tensor:
    """A tensor of PyTorch's over the memory of one of OpenVINO's."""
    return torch.from_numpy(tensor.data)


def _over(tensor: torch.Tensor) -> Any:
    """A tensor of OpenVINO's over the memory of one of PyTorch's."""
    return importlib.import_module("openvino").Tensor(tensor.numpy(), shared_memory=True)


_TRIAL = """
import json, sys, openvino
core = openvino.Core()
model = core.compile_model(core.read_model(sys.argv[1]), "CPU", json.loads(sys.argv[2]))
if not any(port.partial_shape.is_dynamic for port in model.inputs):
    request = model.create_infer_request()
    for place in range(len(model.inputs)):
        request.get_input_tensor(place).data[...] = 0
    request.infer()
"""
_PATIENCE = 600  # seconds


def _try_elsewhere(model: ir.Model, options: dict[str, Any]) -> None:
    """Compile a model, and run it once, in a process of its own, which OpenVINO may take down.

    OpenVINO 2026.4 does with some chains of small products in float32.

    Raises:
        LoweringError: it was taken down, or did not end, or could not be made.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            place = Path(folder) / "model.onnx"
            with quiet():
                ir.save(model, place, external_data="weights")
            command = [sys.executable, "-c", _TRIAL, str(place), json.dumps(options)]
            done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoweringError(f"OpenVINO cannot be tried in a process of its own: {said(error)}") from error
    if done.returncode < 0:  # what it says on its own it says again in this process
        how = signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
        raise LoweringError(f"OpenVINO took down the process that tried the region first: {how}")


@functools.cache
def _core() -> Any:
    return importlib.import_module("openvino").Core()


@functools.cache
def _problem() -> str | None:
    """Why OpenVINO itself does not run here; None when it does."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'graphopt[openvino]')"
    try:
        return None if "CPU" in _core().available_devices else "OpenVINO knows no CPU here"
    except Exception as error:  # the loader's, and OpenVINO's own
        return f"OpenVINO does not load: {_last_line(error)}"


def is_installed() -> bool:
    """True when OpenVINO or its plugin can be found; whether it loads is found out when it is asked for."""
    return importlib.util.find_spec("openvino") is not None or plugin_is_installed()


def _last_line(error: Exception) -> str:
    """What is wrong: the lines above name OpenVINO's own files."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, reversed(lines)), said(error))


def _group(graph: Graph) -> int:
    """How many numbers of an input may get one step: as many as all products allow that quantize theirs.

    Small groups cost time: BERT-base at 1x128 in 8 bits takes 53 ms in groups of 32, 40 in groups of 128 and
    38 in those of 256, on two threads of a CPU with AVX-512 and VNNI (OpenVINO 2026.4).
    """
    return min(filter(None, map(_group_of, graph.calls)), default=0)


def _group_of(node: fx.Node) -> int:
    """The same of one call; 0 where it quantizes nothing that comes in."""
    if node.target is BLOCK_QUANTIZED_LINEAR.overload and argument(node, "rounds_input"):
        return int(argument(node, "weight").meta["val"].shape[2]) * 8 // int(argument(node, "bits"))
    if node.target is DYNAMIC_QUANTIZED_LINEAR.overload:
        features = int(argument(node, "weight").meta["val"].shape[1])
        return min(_LARGEST_GROUP, features & -features)  # which divides them
    return 0


class OpenVino:
    """Compiles regions with OpenVINO.

    Args:
        precision: that it computes in. "f32" is asked for, because OpenVINO takes bf16 by itself where the
            processor has it.

    Raises:
        InputError: the precision is unknown.
    """

    name = "openvino"

    def __init__(self, precision: Precision = "f32") -> None:
        if precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise InputError(f"OpenVINO's precision {precision!r} is unknown", hint=f"one of: {known}")
        self.precision = precision
        self._plugin = Ort()

    def absent(self, target: Target) -> str | None:
        """Why it cannot run on a target at all."""
        if target.device.type != "cpu":
            return f"OpenVINO runs on the CPU, the target is {target}"
        reason = _problem()
        if reason is None or not plugin_is_installed():
            return reason
        return self._plugin.absent(self._through_plugin(target))

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why OpenVINO cannot take a node: it is not there, or the node cannot be handed over as ONNX."""
        return self.absent(target) or inexpressible(node, target.device)

    def compile(self, region: Region, target: Target, effort: str) -> Program:
        """Export the region, and have it compiled.

        Raises:
            LoweringError: the region cannot be exported, or OpenVINO refuses it or takes no node of it.
        """
        settings = Settings(self.precision, torch_threads(target), _group(region.graph))
        if _problem() is not None:
            return self._plugin.compile(region, self._through_plugin(target, settings), effort)
        with tuned_for("openvino"):
            model = to_onnx(region.graph)
        return OpenVinoProgram(region, model, settings)

    def _through_plugin(self, target: Target, settings: Settings | None = None) -> Target:
        options = {} if settings is None else settings.options
        return replace(target, ort=replace(target.ort, provider="openvino", provider_options=options))
