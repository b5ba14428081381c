"""An ONNX model written as a stream: no weight is copied into a message before it is on the disk.

A protobuf message holds each part behind its length. The lengths of the weights are known beforehand, so the
model is written around them: what precedes the graph, the graph without its weights, and each weight from the
tensor's own memory. ``onnx.save`` copies every weight twice on that way.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

LARGEST = 2**31 - 1  # bytes of a protobuf message

_STREAMED_BYTES = 1024  # smaller weights go with the graph
_ALIGNMENT = 4096  # of a weight in its own file, so that it can be mapped
_CHUNK_BYTES = 2**24

# Field numbers of onnx.proto, with the wire type of bytes.
_GRAPH, _INITIALIZER, _RAW_DATA = (number << 3 | 2 for number in (7, 5, 9))


def save(model: ir.Model, place: Path, external_above: int = LARGEST) -> None:
    """Write a model whole or not at all; what was there before is replaced as the last act.

    A model of more bytes than allowed has its weights in a file beside it, named after it and after what is
    in them: an older model at the same place keeps reading its own until it is replaced.

    Args:
        model: its weights may lie anywhere; those not on the CPU are fetched one at a time.
        place: of the file.
        external_above: bytes that one file may have, protobuf's limit of 2 GiB at most.

    Raises:
        OSError: the system refuses; all is as it was.
    """
    file, weights = _ModelFile(model), None
    draft = _hidden(place)
    try:
        if file.nbytes <= min(external_above, LARGEST):
            file.write(draft)
        else:
            weights = _put_weights(file, place)
            file.write_beside(draft, weights.name)
        former = _weights_of(place)
        _on_disk(draft)
        draft.replace(place)
    except BaseException:
        if weights is not None and weights not in _weights_of(place):
            weights.unlink(missing_ok=True)
        raise
    finally:
        draft.unlink(missing_ok=True)
    for path in former:
        if path != weights:
            path.unlink(missing_ok=True)


def _hidden(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")


def _on_disk(path: Path) -> None:
    """Wait until a file is on the disk: renamed earlier, it may be found empty after a power failure."""
    with path.open("rb+") as file:
        os.fsync(file)


def _put_weights(file: _ModelFile, place: Path) -> Path:
    draft = _hidden(place)
    try:
        digest = file.write_weights(draft)
        _on_disk(draft)
        return draft.replace(place.with_name(f"{place.name}.{digest[:16]}.data"))
    finally:
        draft.unlink(missing_ok=True)


def _weights_of(place: Path) -> list[Path]:
    """The files of weights that the model at a place reads: those of its name that occur in it."""
    named = re.compile(re.escape(place.name) + r"\.[0-9a-f]{16}\.data")
    beside = {path.name.encode(): path for path in place.parent.iterdir() if named.fullmatch(path.name)}
    if not beside or not place.is_file():
        return []
    found: set[Path] = set()
    with place.open("rb") as file:
        text = b""
        while chunk := file.read(2**20):  # a map of the file would count as memory in use
            text = text[-len(max(beside, key=len)) :] + chunk
            found.update(path for name, path in beside.items() if name in text)
    return sorted(found)


class _ModelFile:
    """A model and how its parts lie in a file."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._weights = [
            value
            for value in model.graph.initializers.values()
            if value.const_value is not None
            and value.const_value.nbytes >= _STREAMED_BYTES
            and value.const_value.dtype != ir.DataType.STRING
        ]

    @property
    def nbytes(self) -> int:
        """Size of the model in one file."""
        head, parts = self._in_one
        return len(head) + sum(len(part) + int(tensor.nbytes) for part, tensor in parts)

    def write(self, path: Path) -> None:
        """Write the model in one file."""
        head, parts = self._in_one
        with path.open("wb") as file:
            file.write(head)
            for part, tensor in parts:
                file.write(part)
                for chunk in _chunks(tensor):
                    file.write(chunk)

    def write_weights(self, path: Path) -> str:
        """Write the weights alone; returns the SHA-256 of the file."""
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for value, offset in zip(self._weights, self._offsets(), strict=True):
                padding = memoryview(bytes(offset - file.tell()))
                for chunk in itertools.chain((padding,), _chunks(value.const_value)):
                    digest.update(chunk)
                    file.write(chunk)
        return digest.hexdigest()

    def write_beside(self, path: Path, weights: str) -> None:
        """Write the model without its weights, which the file of that name in the same folder has."""
        tensors = [value.const_value for value in self._weights]
        try:
            for value, offset in zip(self._weights, self._offsets(), strict=True):
                tensor: Any = value.const_value
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    weights, offset, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or ""
                )
            message = ir.to_proto(self._model).SerializeToString()
        finally:
            for value, tensor in zip(self._weights, tensors, strict=True):
                value.const_value = tensor
        path.write_bytes(message)

    def _offsets(self) -> list[int]:
        sizes = [value.const_value.nbytes for value in self._weights if value.const_value is not None]
        starts, end = [], 0
        for size in sizes:
            starts.append(-(-end // _ALIGNMENT) * _ALIGNMENT)
            end = starts[-1] + size
        return starts

    @functools.cached_property
    def _in_one(self) -> tuple[bytes, list[tuple[bytes, Any]]]:
        """What precedes the weights, and for each what precedes its bytes, and itself."""
        initializers = self._model.graph.initializers
        for value in self._weights:
            initializers.pop(value.name or "")
        try:
            proto = ir.to_proto(self._model)
        finally:
            for value in self._weights:
                initializers.add(value)
        graph = proto.graph.SerializeToString()
        proto.ClearField("graph")
        parts = [_initializer(value) for value in self._weights]
        inside = len(graph) + sum(len(part) + tensor.nbytes for part, tensor in parts)
        return proto.SerializeToString() + _length(_GRAPH, inside) + graph, parts


def _initializer(value: ir.Value) -> tuple[bytes, Any]:
    tensor: Any = value.const_value
    described = onnx.TensorProto(
        name=value.name, data_type=int(tensor.dtype), dims=list(tensor.shape.numpy())
    )
    message = described.SerializeToString() + _length(_RAW_DATA, tensor.nbytes)
    return _length(_INITIALIZER, len(message) + tensor.nbytes) + message, tensor


def _length(key: int, size: int) -> bytes:
    """The key of a field and the length of what follows, as protobuf writes them: 7 bits a byte."""
    out = bytearray([key])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes((*out, size))


def _chunks(tensor: Any) -> Iterator[memoryview]:
    """A weight's bytes, from its own memory where it lies in order there."""
    if tensor.dtype.itemsize < 1:
        content: Any = memoryview(tensor.tobytes())
    else:
        content = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
    for start in range(0, len(content), _CHUNK_BYTES):
        yield content[start : start + _CHUNK_BYTES]
