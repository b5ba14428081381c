"""The tokens of a padded batch, one behind the other, without the padding between them.

    out[0, i, ...] = x[indices[i] // S, indices[i] % S, ...]

The result keeps x's rank as a batch of one long sequence, so that what works on each token by itself takes it
as it took x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._rows import refuse_row, row_configs, row_pointers, row_tile
from graphopt.kernels._shape import nbytes, require, shape_of
from graphopt.kernels._triton import (
    jit,
    last_contiguous,
    launch,
    refuse,
    tl,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import choose

SCHEMA = "(Tensor x, Tensor indices) -> Tensor"


def _shape(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (B, S, ...), any dtype.
        indices: (N,), int64: positions in the batch, row by row, each within [0, B * S).

    Returns:
        An empty (1, N, ...) of x's dtype.

    Raises:
        ValueError: x has no positions, or indices is no vector of int64.
    """
    require(x.dim() >= 2, f"pack_tokens: x must be (batch, length, ...), not {shape_of(x)}")
    fits = indices.dim() == 1 and indices.dtype == torch.int64
    given = f"{shape_of(indices)} {indices.dtype}"
    require(fits, f"pack_tokens: indices must be a vector of int64, not {given}")
    return x.new_empty((1, indices.shape[0], *x.shape[2:]))


def _reference(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).index_select(0, indices)[None]


def _cost(x: torch.Tensor, indices: torch.Tensor) -> Cost:
    """An operation an element that is taken; what is left behind is not read."""
    taken = indices.shape[0] * x[0, 0].numel() if x.numel() else 0
    return Cost(flops=float(taken), bytes=2 * taken * x.element_size() + nbytes(indices))


@jit
def _pack_tokens_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    indices_ptr,
    tokens,
    positions,
    length,
    stride_xb,
    stride_xs,
    stride_i,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program copies some tokens; one that is nowhere in the batch becomes zeros."""
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    row, column, seen = row_tile(tokens, D, BLOCK_R, BLOCK_D)
    index = tl.load(indices_ptr + row.to(tl.int64) * stride_i, mask=row < tokens, other=0)
    inside = seen & (index >= 0) & (index < positions)
    place = index.to(tl.int32)
    start = (place // length).to(tl.int64) * stride_xb + (place % length).to(tl.int64) * stride_xs
    taken = tl.load(x_ptr + start + column, mask=inside, other=0)
    tl.store(row_pointers(out_ptr, row, column, D), taken, mask=seen)


def _launch(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    (batch, length), tokens = x.shape[:2], indices.shape[0]
    out = x.new_empty((1, tokens, *x.shape[2:]))
    features = x.shape[2:].numel()
    x_BSD = last_contiguous(x.reshape(batch, length, features))
    key = (tokens, features, x.dtype)
    config = choose(_pack_tokens_kernel, x.device, key, row_configs(tokens, features, x.device))
    grid = (-(-tokens // config.tiles["BLOCK_R"]) if features else 0,)
    args = (out, x_BSD, indices, tokens, batch * length, length, *x_BSD.stride()[:2], indices.stride(0))
    launch(_pack_tokens_kernel, grid, *args, D=features, **config.options)
    return out


def _refuses(x: torch.Tensor, indices: torch.Tensor) -> str | None:
    if x.shape[0] * x.shape[1] >= 2**31:
        return f"{x.shape[0] * x.shape[1]} positions are more than 32 bits number"
    if x.is_complex():
        return "complex numbers are not loaded"
    return refuse(x, indices) or refuse_row(x.shape[2:].numel())


def _onnx(x: Value, indices: Value) -> Any:
    """A Gather of rows: ONNX Runtime copies each as a whole."""
    rows = op.Reshape(x, op.Concat(op.Constant(value_ints=[-1]), op.Shape(x, start=2), axis=0))
    return op.Unsqueeze(op.Gather(rows, indices), [0])


def _samples() -> Iterator[Sample]:
    yield Sample((torch.randn(2, 5, 24), torch.tensor([3, 7])), label="a token a sequence")
    yield Sample((torch.randn(3, 5, 4, 8), torch.tensor([0, 1, 5, 12, 13, 14, 14])), label="heads, one twice")
    yield Sample((torch.randn(3, 1, 4).expand(3, 7, 4), torch.arange(2, 19)), label="one row a sequence")
    yield Sample((1e3 * torch.randn(3, 7, 16), torch.arange(20)), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, indices = torch.randn(2, 5, 24), torch.tensor([3, 7])
    yield BadSample((x[0, 0], indices), match="x must be")
    yield BadSample((x, indices.int()), match="indices must be a vector of int64")
    yield BadSample((x, indices[None]), match="indices must be a vector of int64")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("pack_tokens", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
