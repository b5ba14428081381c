"""Weights of a session: read in the model's own memory where that is safe, handed over beside the file.

Nothing of them is in the file, so that a model of any size is one: protobuf ends at 2 GB.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from graphopt.errors import LoweringError
from graphopt.runtime.onnx_translation import quiet

_SHARED = "shared"  # the "file" of initializers that live in the model's memory
_MIN_SHARED_BYTES = 1024  # smaller ones stay in the graph, where ONNX Runtime's own folding sees them
_MAX_FILE_BYTES = 2**31 - 1  # of protobuf


class Held:
    """A weight as an OrtValue, with the memory that it points into.

    Args:
        memory: a tensor or an array, contiguous.
        kind: its ONNX type.
    """

    def __init__(self, memory: Any, kind: ir.DataType) -> None:
        self.memory = memory
        if isinstance(memory, torch.Tensor):
            self.value = onnxruntime.OrtValue.from_dlpack(memory)
        else:
            self.value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(memory, int(kind))


@dataclass(frozen=True)
class Weights:
    """The large initializers of a model, by name.

    Args:
        shared: those that the session reads where they are, as long as it lives.
        copied: those that it copies, on the host: its own folding reads them there.
    """

    shared: dict[str, Held]
    copied: dict[str, Held]

    def hand_over(self, options: Any) -> None:
        """Tell a session's options of them.

        ONNX Runtime copies what ``add_external_initializers`` hands it (440 MB for BERT-base) and takes what
        ``add_initializer`` hands it as it is.
        """
        for name, held in self.shared.items():
            options.add_initializer(name, held.value)
        options.add_external_initializers(list(self.copied), [held.value for held in self.copied.values()])


def large(model: ir.Model) -> Iterator[tuple[str, ir.Value, Any]]:
    """The initializers that are kept out of the file: name, value, tensor."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _MIN_SHARED_BYTES and tensor.dtype != ir.DataType.STRING:
            yield value.name or "", value, tensor


def shareable(model: ir.Model) -> set[str]:
    """The initializers that a session may read in the model's memory.

    ONNX Runtime insists that the file exists which the model names for them. That file is one long hole,
    which its constant folding would read as zeros: so they are those that nothing but a kernel reads, the
    matrix of a product and the table of a lookup whose other operand the inputs decide.
    """
    return {name for name, value, _ in large(model) if _only_kernels_read(value)}


def collect(model: ir.Model, share: Collection[str]) -> Weights:
    """The large initializers.

    Args:
        model: whose initializers refer to the model's tensors.
        share: the names of those to share.
    """
    shared, copied = {}, {}
    for name, _, tensor in large(model):
        if name in share:
            shared[name] = _held(tensor)
        else:
            copied[name] = _held(tensor, on_host=True)
    return Weights(shared, copied)


_HELD: weakref.WeakValueDictionary[tuple[Any, ...], Held] = weakref.WeakValueDictionary()


def _held(tensor: Any, *, on_host: bool = False) -> Held:
    """A weight as an OrtValue, the same for all sessions of the process that read the same tensor.

    So a weight with strides of its own, which must be written out, is there once however many sessions read
    it. What ONNX Runtime packs for its products is there once a session: the container that would share it
    can be reached from C alone.
    """
    raw = getattr(tensor, "raw", None)
    if not isinstance(raw, torch.Tensor):
        return Held(np.ascontiguousarray(tensor.numpy()), tensor.dtype)
    raw = raw.detach().resolve_neg()
    if on_host and raw.device.type != "cpu":
        return Held(raw.cpu().contiguous(), tensor.dtype)
    key = (raw.data_ptr(), raw.dtype, raw.device, tuple(raw.shape), raw.stride())
    held = _HELD.get(key)
    if held is None:
        held = Held(raw.contiguous(), tensor.dtype)
        held.source = raw  # type: ignore[attr-defined]  # while it lives nothing else is at that address
        _HELD[key] = held
    return held


def write_without_weights(model: ir.Model, path: Path) -> None:
    """Write a model without its large initializers, beside the hole that they are said to be in.

    Raises:
        LoweringError: what is left is more than a file may hold.
    """
    path.write_bytes(without_weights(model, lambda name: (_SHARED, 0)))
    with (path.parent / _SHARED).open("wb") as hole:
        hole.truncate(max((tensor.nbytes for _, _, tensor in large(model)), default=0))


def without_weights(model: ir.Model, place: Callable[[str], tuple[str, int]]) -> bytes:
    """A model as it is in a file, its large initializers left out.

    Args:
        model: the model, which stays as it is.
        place: by the name of an initializer, the file that it is said to be in, and where in there.

    Raises:
        LoweringError: what is left is more than a file may hold.
    """
    originals = list(large(model))
    try:
        for name, value, tensor in originals:
            shape = ir.Shape(tensor.shape.numpy())
            file, offset = place(name)
            value.const_value = ir.ExternalTensor(
                file, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name
            )
        with quiet():
            proto = ir.to_proto(model)
        if proto.ByteSize() > _MAX_FILE_BYTES:
            raise LoweringError(
                f"the model without its weights is {proto.ByteSize()} bytes, above protobuf's 2 GB"
            )
        return bytes(proto.SerializeToString())
    finally:
        for _, value, tensor in originals:
            value.const_value = tensor


def _only_kernels_read(weight: ir.Value) -> bool:
    """True for the matrix of a product and the table of a lookup whose other operand the inputs decide."""
    places = {"Gemm": (1, 0), "Gather": (0, 1)}  # where the weight stands, and where the other operand
    for node, index in weight.uses():
        at, other = places.get(node.op_type, (-1, -1))
        if index != at or not _depends_on_inputs(node.inputs[other]):
            return False
    return True


def _depends_on_inputs(value: ir.Value | None) -> bool:
    """True when a value is a graph input, or is computed from one."""
    work, seen = [value], set()
    while work:
        current = work.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if current.is_graph_input() and current.const_value is None:
            return True
        producer = current.producer()
        work.extend(producer.inputs if producer is not None else ())
    return False
