"""Tensors bound to a session by their addresses: nothing is copied on the way in or out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch.utils.dlpack import from_dlpack

# What ONNX Runtime has kernels for on every provider, and what else it has them for on a GPU.
CPU_DTYPES = frozenset(
    {
        torch.float32,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
GPU_DTYPES = CPU_DTYPES | {torch.bfloat16}


def bind_inputs(binding: Any, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Bind a call's inputs; those with strides of their own, or read negated, are written out first.

    Args:
        binding: of the session.
        names: of its inputs.
        tensors: in the order of the names.

    Returns:
        The tensors that are bound: the binding knows addresses alone, so they must live until it has run.
    """
    kept = [tensor.detach().resolve_neg().contiguous() for tensor in tensors]
    for name, tensor in zip(names, kept, strict=True):
        binding.bind_input(name, *_place(tensor))
    return kept


def bind_outputs(
    binding: Any, names: Sequence[str], outputs: Sequence[torch.Tensor | None], device: torch.device
) -> None:
    """Bind the outputs of a call.

    Args:
        binding: of the session.
        names: of its outputs.
        outputs: where each is written; None for one that ONNX Runtime is to allocate.
        device: of the outputs.
    """
    for name, tensor in zip(names, outputs, strict=True):
        if tensor is None:
            binding.bind_output(name, device.type, device.index or 0)
        else:
            binding.bind_output(name, *_place(tensor))


def take_outputs(binding: Any, outputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The outputs of a call: those that ONNX Runtime allocated are taken over, memory and all."""
    results = list(outputs)
    if any(result is None for result in results):
        made = binding.get_outputs()
        for index, result in enumerate(results):
            if result is None:
                results[index] = _taken_over(made[index])
    return results  # type: ignore[return-value]


def _taken_over(value: Any) -> torch.Tensor:
    """A tensor on the memory of an OrtValue, which lives as long as the tensor does."""
    tensor: torch.Tensor = from_dlpack(value)
    if value.data_type() == "tensor(bool)" and tensor.dtype != torch.bool:
        return tensor.view(torch.bool)  # DLPack had no such type once: its bytes are the same
    return tensor


def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
    kind = int(from_torch_dtype(tensor.dtype))
    device = tensor.device
    return device.type, device.index or 0, kind, list(tensor.shape), _address(tensor)


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's values lie; an empty one lies nowhere, and ONNX Runtime wants an address."""
    return tensor.data_ptr() or _NOWHERE.data_ptr()


_NOWHERE = torch.zeros(1)
