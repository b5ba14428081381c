"""Fingerprints of tensors: of weights by their bytes, of outputs by projections that tell distances, too."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from graphopt.ir.graph import Graph

_PROJECTIONS = 16
_SEED = 20250311


def digest(tensor: torch.Tensor) -> str:
    """The first 64 bits of the SHA-256 of a tensor's dtype, shape and values."""
    dense = tensor.detach().cpu().contiguous()
    raw = dense.reshape(-1).view(torch.uint8) if dense.numel() else dense.reshape(-1).to(torch.uint8)
    found = hashlib.sha256(f"{dense.dtype} {list(dense.shape)}".encode())
    found.update(raw.numpy().data)
    return found.hexdigest()[:16]


def weights(graph: Graph) -> dict[str, str]:
    """The digest of every weight of a captured graph, by the model's own name of it."""
    return {" = ".join(c.sources) or name: digest(c.tensor) for name, c in graph.constants.items()}


def described(tensor: torch.Tensor) -> str:
    """``float32 [8, 128]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def inputs(graph: Graph, given: Sequence[torch.Tensor]) -> dict[str, str]:
    """What each input is, and its digest."""
    paths = {spec.node: spec.path for spec in graph.inputs if spec.node is not None}
    return {
        paths.get(node.name, node.name): f"{described(tensor)} {digest(tensor)}"
        for node, tensor in zip(graph.placeholders, given, strict=True)
    }


def sketch(values: Sequence[Any], before: Sequence[Any]) -> list[dict[str, Any]]:
    """Outputs in a few numbers each, which two runs can be compared by.

    A floating output of n values becomes 16 sums of its values with random signs, scaled so that the distance
    of two sketches is on average that of the outputs themselves, in the 2-norm (Achlioptas, Database-friendly
    random projections, 2003); 16 of them give it within about 20 %. All else is told by its digest.

    Args:
        values: of the outputs, floating ones in float64.
        before: the outputs in the model's own precision, for their dtypes.
    """
    return [_sketch(value, own) for value, own in zip(values, before, strict=True)]


def _sketch(value: Any, own: Any) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        return {"type": type(value).__name__, "digest": hashlib.sha256(repr(value).encode()).hexdigest()[:16]}
    row: dict[str, Any] = {"type": described(own)}
    if not value.is_floating_point():
        return {**row, "digest": digest(value)}
    flat = torch.nan_to_num(value.detach().cpu().double().reshape(-1)).numpy()
    source = np.random.Philox(key=_SEED)  # its raw bits are the same in every version and on every machine
    words = -(-flat.size // 64)
    sums = []
    for _ in range(_PROJECTIONS):
        bits = np.unpackbits(source.random_raw(words).astype("<u8").view(np.uint8), count=flat.size)
        sums.append(float(2.0 * flat[bits.astype(bool)].sum() - flat.sum()) / math.sqrt(_PROJECTIONS))
    norm = float(np.linalg.norm(flat))
    return {**row, "norm": float(f"{norm:.9g}"), "sketch": [float(f"{number:.9g}") for number in sums]}


def distance(now: Sequence[Mapping[str, Any]], locked: Sequence[Mapping[str, Any]]) -> float:
    """The largest relative distance of outputs from those of the lock; infinite where types differ."""
    if len(now) != len(locked):
        return math.inf
    worst = 0.0
    for new, old in zip(now, locked, strict=True):
        if "sketch" in new and "sketch" in old and new["type"] == old["type"]:
            size = old["norm"]
            moved = math.dist(new["sketch"], old["sketch"])
            worst = max(worst, moved / size if size else (math.inf if moved else 0.0))
        elif new != old:
            return math.inf
    return worst
