"""A region as a model that OpenVINO has compiled, and its calls."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnx_ir as ir
import torch

from graphopt.errors import ExecutionError, LoweringError
from graphopt.runtime.executors._protocol import KernelTime, Silent
from graphopt.runtime.executors._remade import Remade
from graphopt.runtime.executors.openvino import reading
from graphopt.runtime.executors.ort.program import fixed_shape
from graphopt.runtime.executors.ort.providers import openvino_options
from graphopt.runtime.region import Region

Precision = Literal["f32", "bf16"]

Output = tuple[torch.dtype, tuple[int, ...] | None]  # its type, and its shape where that is fixed

_PROFILED_RUNS = 3
_COPIED_BYTES = 2**16  # 4 us


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
            reading.try_elsewhere(model, settings.options)
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
        options = {**settings.options, "PERF_COUNT": counted}
        try:
            # OpenVINO copies what it takes for the weights of a file, but no file has to be written for it.
            read, self._weights = reading.read(model)
            self._model = reading.core().compile_model(read, "CPU", options)
            given = self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        except Exception as error:
            raise LoweringError(f"OpenVINO refuses the region: {reading.last_line(error)}") from error
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
            raise ExecutionError(
                f"OpenVINO failed in the middle of a run: {reading.last_line(error)}"
            ) from error
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
