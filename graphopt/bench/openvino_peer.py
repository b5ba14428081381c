"""OpenVINO as a peer: PyTorch's own ONNX export on a CPU, for the lowest latency."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from graphopt.bench.onnx_peers import exported, transformer_type, unprinted
from graphopt.bench.peer import Mode, Problem, Run, installed
from graphopt.compiler.lossy import relative_distance
from graphopt.errors import LoweringError
from graphopt.runtime.onnx_translation import quiet

_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_STATIC, _COMPRESSED = "int8-static", ("int8", "int8-weights", "int4")


def openvino_modes(problem: Problem) -> Sequence[Mode]:
    """In the model's own dtype; where bf16 is allowed in that, too, and where codes are, as NNCF quantizes.

    Left alone OpenVINO computes a float32 model in bfloat16 where the processor can, which is another model.
    """
    own = Mode("", lambda p: _run(p, str(exported(p)), _own_type(p)))
    if problem.precision == "bf16":
        return [own, own.narrowed("bf16", lambda p: _run(p, str(exported(p)), "bf16"))]
    if not installed("nncf"):
        return [own]
    if problem.precision == _STATIC:
        within = Mode(f"{_STATIC} within the loss", _within, _STATIC)
        return [own, own.narrowed(_STATIC, _quantized), within]
    if problem.precision in _COMPRESSED:
        return [own, own.narrowed(problem.precision, _compressed)]
    return [own]


def _own_type(problem: Problem) -> str:
    return _TYPES.get(problem.dtype, "f32")


def _quantized(problem: Problem) -> Run:
    """All that NNCF quantizes, its ranges found on the problem's own inputs, as graphopt's are."""
    nncf: Any = importlib.import_module("nncf")
    with _silent(nncf):
        made = nncf.quantize(_read(problem), _dataset(nncf, problem), **_options(nncf, problem))
    return _run(problem, made, _own_type(problem))


def _within(problem: Problem) -> Run:
    """The same with so many layers left as they are that the loss is within the problem's."""
    nncf: Any = importlib.import_module("nncf")

    def kept(compiled: Any, inputs: Iterable[dict[int, Any]]) -> tuple[float, None]:
        (given,) = inputs
        found = compiled(given)
        values = [torch.from_numpy(found[port]) for port in compiled.outputs]
        return -relative_distance(problem.outputs, values), None

    with _silent(nncf):
        made = nncf.quantize_with_accuracy_control(
            _read(problem),
            *(_dataset(nncf, problem) for _ in range(2)),  # to calibrate on, and to validate on
            kept,
            max_drop=problem.max_loss,
            drop_type=nncf.DropType.ABSOLUTE,
            **_options(nncf, problem),
        )
    return _run(problem, made, _own_type(problem))


def _compressed(problem: Problem) -> Run:
    """Weights as NNCF writes them: in 4 bits in blocks of 32, as graphopt's, or in 8 with a scale a row.

    What is multiplied by them OpenVINO quantizes as it comes, in 32 numbers at a time, where it can.
    """
    nncf: Any = importlib.import_module("nncf")
    modes = nncf.CompressWeightsMode
    how: dict[str, Any] = {"mode": modes.INT8_SYM}
    if problem.precision == "int4":
        how = {"mode": modes.INT4_SYM, "group_size": 32, "ratio": 1.0}
    with _silent(nncf):
        made = nncf.compress_weights(_read(problem), **how)
    return _run(problem, made, _own_type(problem))


@contextmanager
def _silent(nncf: Any) -> Iterator[None]:
    """What NNCF says of its progress is not printed."""
    nncf.set_log_level(logging.ERROR)
    with quiet(), unprinted():
        yield


def _options(nncf: Any, problem: Problem) -> dict[str, Any]:
    kind = nncf.ModelType.TRANSFORMER if transformer_type(problem) else None
    return {"model_type": kind, "subset_size": 1}


def _dataset(nncf: Any, problem: Problem) -> Any:
    return nncf.Dataset([{index: tensor.numpy() for index, tensor in enumerate(problem.inputs)}])


def _read(problem: Problem) -> Any:
    openvino: Any = importlib.import_module("openvino")
    return openvino.Core().read_model(str(exported(problem)))


def _run(problem: Problem, model: Any, asked: str) -> Run:
    """A model in a precision, told by its hint.

    Args:
        problem: what it runs.
        model: the file, or the model that was read.
        asked: the precision of what is not quantized.

    Raises:
        LoweringError: it computes in another precision all the same.
    """
    ov: Any = importlib.import_module("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": asked,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = ov.Core().compile_model(model, "CPU", settings)
    given = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if given != asked:
        raise LoweringError(f"OpenVINO computes in {given} on this processor, not in {asked}")
    request = compiled.create_infer_request()
    inputs = [tensor.contiguous() for tensor in problem.inputs]
    results = [torch.empty_like(out, memory_format=torch.contiguous_format) for out in problem.outputs]
    held = [_tensor(ov, tensor) for tensor in (*inputs, *results)]
    for index, tensor in enumerate(held[: len(inputs)]):
        request.set_input_tensor(index, tensor)
    for index, tensor in enumerate(held[len(inputs) :]):
        request.set_output_tensor(index, tensor)

    def run() -> list[torch.Tensor]:
        request.infer()
        return results

    run.held = (inputs, held)  # type: ignore[attr-defined]  # their memory must live on
    run()
    return run


def _tensor(ov: Any, tensor: torch.Tensor) -> Any:
    """A tensor of OpenVINO's over the memory of one of PyTorch's."""
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type
        return ov.Tensor(tensor.view(torch.int16).numpy(), ov.Shape(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.detach().numpy(), shared_memory=True)
