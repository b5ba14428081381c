"""The peers that run PyTorch's own ONNX export in ONNX Runtime: by itself, and by its TensorRT provider."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from graphopt.bench.peer import Mode, Problem, Run
from graphopt.errors import LoweringError
from graphopt.runtime.onnx_translation import quiet

_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


def export_plain(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """PyTorch's own ONNX export of a model, as anybody gets it."""
    with quiet(), unprinted(), torch.no_grad():
        return torch.onnx.export(model, args, kwargs=dict(kwargs), dynamo=True, verbose=False)


def unprinted() -> contextlib.AbstractContextManager[Any]:
    """Advice of converters, which nobody asked for, is not printed."""
    return contextlib.redirect_stdout(io.StringIO())


def exported(problem: Problem) -> Path:
    """The plain export as a file, made once for all who run it."""
    path = problem.folder / "plain.onnx"
    if not path.exists():
        program = export_plain(problem.model, problem.args, problem.kwargs)
        program.save(path, external_data=True)
    return path


# ONNX Runtime


def onnxruntime_modes(problem: Problem) -> Sequence[Mode]:
    """All its own optimizations; after its optimizer of transformers, too; and on a GPU as a CUDA graph.

    Where int8 is allowed, both are also quantized on the CPU, as its documentation has it for transformers.
    """
    modes = [Mode("", lambda p: exported_run(p, exported(p)))]
    if transformer_type(problem):
        modes.append(Mode("transformers optimizer", lambda p: exported_run(p, _transformer_optimized(p))))
    if problem.device.type == "cuda":
        modes.append(cuda_graph_mode("", exported))
        if transformer_type(problem):
            modes.append(cuda_graph_mode("transformers optimizer", _transformer_optimized))
    elif problem.precision in ("int8", "int8-static"):
        modes += [mode.narrowed("int8", _quantized(_MADE[mode.name])) for mode in modes]
    return modes


def exported_run(problem: Problem, path: Path) -> Run:
    """A model that was exported, run by ONNX Runtime on the problem's device with all its optimizations."""
    return _session(problem, path, _provider(problem))


def cuda_graph_mode(name: str, export: Callable[[Problem], Path]) -> Mode:
    """ONNX Runtime's own CUDA graph of an exported model.

    Args:
        name: of the mode that launches the same model kernel by kernel.
        export: writes the model, or finds it written.
    """

    def build(problem: Problem) -> Run:
        return _session(problem, export(problem), _provider(problem, enable_cuda_graph="1"))

    return Mode(f"{name}, CUDA graph" if name else "CUDA graph", build)


def transformer_type(problem: Problem) -> str:
    """What ONNX Runtime's optimizer of transformers calls the model; "" where it does not know it."""
    from onnxruntime.transformers.optimizer import MODEL_TYPES

    kind = getattr(getattr(problem.model, "config", None), "model_type", "")
    return kind if kind in MODEL_TYPES else ""


def _transformer_optimized(problem: Problem) -> Path:
    """The plain export after ``onnxruntime.transformers.optimizer``.

    Raises:
        LoweringError: it fused nothing, so that there is nothing to measure.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    path = problem.folder / "transformers.onnx"
    if not path.exists():
        gpu = problem.device.type == "cuda"
        plain, kind = str(exported(problem)), transformer_type(problem)
        made = optimize_model(plain, kind, opt_level=0, use_gpu=gpu)
        if not any(made.get_fused_operator_statistics().values()):
            raise LoweringError("its optimizer of transformers fuses nothing in this export")
        made.save_model_to_file(str(path), use_external_data_format=True)
    return path


# The model of each mode on a CPU.
_MADE = {"": exported, "transformers optimizer": _transformer_optimized}


def _quantized(made: Callable[[Problem], Path]) -> Callable[[Problem], Run]:
    """A session on a model quantized dynamically: weights in int8 by column, rows as they come."""

    def build(problem: Problem) -> Run:
        from onnxruntime.quantization import quantize_dynamic

        path = made(problem)
        model, quantized = onnx.load(path), path.with_name(f"int8-{path.name}")
        weights = {weight.name for weight in model.graph.initializer}
        for value in [value for value in model.graph.value_info if value.name in weights]:
            model.graph.value_info.remove(value)  # it transposes weights, and trips over their old shapes
        with quiet(), unprinted():
            quantize_dynamic(model, quantized, per_channel=True)
        return _session(problem, quantized, _provider(problem))

    return build


def _provider(problem: Problem, **options: str) -> tuple[str, dict[str, Any]]:
    if problem.device.type != "cuda":
        return "CPUExecutionProvider", {}
    # Left alone, float32 is multiplied in TF32 on GPUs that can, which is another model.
    return _CUDA, {**_on_stream(problem), "use_tf32": "0", **options}


def _on_stream(problem: Problem) -> dict[str, Any]:
    """The device and the caller's stream, so that no event is recorded on another one."""
    stream = torch.cuda.current_stream(problem.device)
    return {"device_id": str(problem.device.index or 0), "user_compute_stream": str(stream.cuda_stream)}


def tensorrt_provider(problem: Problem) -> Run:
    """ONNX Runtime's TensorRT provider, in the model's dtype, as a CUDA graph."""
    options = {**_on_stream(problem), "trt_cuda_graph_enable": "1"}
    if problem.dtype in (torch.float16, torch.bfloat16):
        options["trt_fp16_enable" if problem.dtype == torch.float16 else "trt_bf16_enable"] = "1"
    # What TensorRT does not take runs on the GPU as well, as it does for whoever uses this provider.
    return _session(problem, exported(problem), (_TENSORRT, options), _provider(problem))


def _session(problem: Problem, path: Path, *providers: tuple[str, dict[str, Any]]) -> Run:
    """A session whose inputs and outputs are bound to torch's memory once, so that nothing is copied.

    On a GPU a call ends when its kernels are launched, as every other side's does: they run on the caller's
    stream, so that who waits for that waits for them.

    Args:
        problem: what it runs.
        path: the ONNX model.
        providers: with their options, the first preferred.

    Raises:
        LoweringError: ONNX Runtime fell back to another provider.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # As graphopt's executor: threads that spin between calls would slow down whichever side comes next. Calls
    # one after the other take as long with it as without: 0.11 ms for an MLP of 8x16x64 on two cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    wanted, found = providers[0][0], session.get_providers()[0]
    if found != wanted:
        raise LoweringError(f"{wanted} does not load here: ONNX Runtime falls back to {found}")
    calls = onnxruntime.RunOptions()
    if problem.device.type == "cuda":
        calls.add_run_config_entry("disable_synchronize_execution_providers", "1")
    binding = session.io_binding()
    inputs = [tensor.contiguous() for tensor in problem.inputs]
    results = [torch.empty_like(out, memory_format=torch.contiguous_format) for out in problem.outputs]
    for value, tensor in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_input(value.name, *_place(tensor))
    for value, tensor in zip(session.get_outputs(), results, strict=True):
        binding.bind_output(value.name, *_place(tensor))

    def run() -> list[torch.Tensor]:
        session.run_with_iobinding(binding, calls)
        return results

    run.inputs = inputs  # type: ignore[attr-defined]  # the binding knows addresses alone: they must live on
    run()
    return run


def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
    kind = int(from_torch_dtype(tensor.dtype))
    return tensor.device.type, tensor.device.index or 0, kind, list(tensor.shape), tensor.data_ptr()
