"""The peers, each in its best honest mode: a model goes in, a function of no arguments comes out."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.utils._pytree as pytree

Run = Callable[[], list[torch.Tensor]]


def eager(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """The model itself, without autograd."""

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors(model(*args, **kwargs))

    return run


def inductor(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """``torch.compile`` with max-autotune; weights frozen, as it advises for inference."""
    torch._inductor.config.freezing = True  # type: ignore[attr-defined]
    compiled = torch.compile(model, mode="max-autotune-no-cudagraphs")
    return eager(compiled, args, kwargs)  # type: ignore[arg-type]


def onnxruntime_plain(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """``torch.onnx.export(dynamo=True)`` run by ONNX Runtime with all its own optimizations.

    Inputs and outputs are bound to torch's memory, as graphopt does it, so that only the graphs differ.
    """
    program = export_plain(model, args, kwargs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    proto = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    inputs = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    names = [value.name for value in session.get_inputs()]
    with torch.no_grad():
        shapes = [(out.shape, out.dtype) for out in tensors(model(*args, **kwargs))]

    def run() -> list[torch.Tensor]:
        binding = session.io_binding()
        for name, tensor in zip(names, inputs, strict=True):
            binding.bind_input(name, "cpu", 0, _numpy(tensor.dtype), list(tensor.shape), tensor.data_ptr())
        results = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        for value, out in zip(session.get_outputs(), results, strict=True):
            binding.bind_output(value.name, "cpu", 0, _numpy(out.dtype), list(out.shape), out.data_ptr())
        session.run_with_iobinding(binding)
        return results

    return run


def export_plain(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """PyTorch's own ONNX export of a model, as anybody gets it."""
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.onnx.export(model, args, kwargs=dict(kwargs), dynamo=True, verbose=False)


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _numpy(dtype: torch.dtype) -> Any:
    return np.dtype(str(dtype).removeprefix("torch.").replace("bool", "bool_"))


PEERS: dict[str, Callable[..., Run]] = {
    "eager": eager,
    "inductor": inductor,
    "onnxruntime": onnxruntime_plain,
}
