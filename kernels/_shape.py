"""What the shape rules and cost functions of several ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.ir.graph import same_size
from graphopt.ir.op import Cost


def require(condition: object, message: str) -> None:
    """Refuse the arguments of an op.

    Args:
        condition: what must hold; a symbolic condition becomes a guard.
        message: the thing that is wrong, with the shapes or dtypes that were given.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)


def shape_of(x: torch.Tensor | None) -> str:
    """A tensor's shape as the error messages print it: ``(2, 5, 8)``, or ``None``."""
    return "None" if x is None else str(tuple(x.shape))


def require_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that are not floating or not all of one dtype.

    Args:
        op: the op's name, for the message.
        tensors: the arguments by name; None stands for an optional one that is not given.

    Raises:
        ValueError: a dtype differs from the first tensor's, or that one is not floating.
    """
    given = {name: x.dtype for name, x in tensors.items() if x is not None}
    first, dtype = next(iter(given.items()))
    require(dtype.is_floating_point, f"{op}: {first} must be floating, not {dtype}")
    for name, other in given.items():
        require(other == dtype, f"{op}: {name} is {other}, but {first} is {dtype}")


def require_weight(op: str, x: torch.Tensor, weight: torch.Tensor | None, name: str = "weight") -> None:
    """Refuse a weight or table that is neither of x's dtype nor float32.

    Raises:
        ValueError: it has another dtype.
    """
    if weight is not None and weight.dtype != torch.float32:
        require_floating(op, **{"x": x, name: weight})


def require_residual(op: str, x: torch.Tensor, residual: torch.Tensor) -> None:
    """Refuse a residual that does not broadcast to x, or of another type where neither is float32.

    Raises:
        ValueError: the shape or the dtype does not fit.
    """
    types = (x.dtype, residual.dtype)
    wide = torch.promote_types(*types)
    fits = residual.dtype == x.dtype or (wide == torch.float32 and torch.float32 in types)
    require(fits, f"{op}: residual is {residual.dtype}, but x is {x.dtype}")
    missing = x.dim() - residual.dim()
    fits = missing >= 0 and all(
        same_size(given, 1) or given == size
        for given, size in zip(residual.shape, x.shape[missing:], strict=True)
    )
    require(fits, f"{op}: residual {shape_of(residual)} does not broadcast to x {shape_of(x)}")


def require_last_dim(op: str, x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """Refuse per-feature vectors that are not of shape ``(x.shape[-1],)``; None is passed over.

    Raises:
        ValueError: ``x`` has no dimension, or a vector has another shape.
    """
    require(x.dim() >= 1, f"{op}: the input needs at least one dimension")
    for name, vector in vectors.items():
        fits = vector is None or (vector.dim() == 1 and vector.shape[0] == x.shape[-1])
        require(fits, f"{op}: {name} has shape {shape_of(vector)}, but the last dimension is {x.shape[-1]}")


def total_bytes(x: torch.Tensor, residual: torch.Tensor) -> int:
    """Bytes of ``x + residual`` where the residual broadcasts to x."""
    return x.numel() * torch.promote_types(x.dtype, residual.dtype).itemsize


def is_channels_last(x: torch.Tensor) -> bool:
    """True where the channels of each pixel, more than one, lie together, and the pixels one after the other.

    Asking adds no guard on dynamic dimensions. The stride from image to image may be any.
    """
    if x.dim() not in _CHANNELS_LAST or same_size(x.shape[1], 1):
        return False
    apart = 1
    for dim in (1, *range(x.dim() - 1, 1, -1)):
        if not same_size(x.stride(dim), apart):
            return False
        apart = apart * x.shape[dim]
    return True


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """That of a convolution's result: channels last where one of these images or filters is."""
    found = (_CHANNELS_LAST[x.dim()] for x in tensors if is_channels_last(x))
    return next(found, torch.contiguous_format)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors together, each read or written once; None counts nothing."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def product_cost(
    x: torch.Tensor, shape: Sequence[Any], *others: torch.Tensor | None, dtype: torch.dtype | None = None
) -> Cost:
    """That of a product of rows and a matrix; what follows it is not worth counting beside it.

    Args:
        x: (..., K).
        shape: of the matrix, (N, K).
        others: what is read besides x, the matrix as it lies in memory among them.
        dtype: of the result; None for x's.
    """
    outputs, features = shape
    rows = x.numel() // features
    written = rows * outputs * (dtype or x.dtype).itemsize
    return Cost(flops=2.0 * rows * outputs * features, bytes=nbytes(x, *others) + written)


def convolved_sizes(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The spatial sizes of a convolution's result, of which each sequence holds a number each."""
    numbers = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(size + 2 * pad - far * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, far in numbers]
