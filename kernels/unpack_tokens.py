"""Packed tokens back at their places in a padded batch, zeros at all others.

    rank[b, s] = the number of True in mask in front of (b, s), row by row
    out[b, s, ...] = x[0, rank[b, s], ...] if mask[b, s] and rank[b, s] < N else 0

What lies behind the last token (a buffer of fixed size has more rows than tokens) is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._rows import LONGEST, power_of_two, refuse_row, row_pointers, row_tile, trues_before
from graphopt.kernels._shape import nbytes, require, shape_of
from graphopt.kernels._triton import as_rows, jit, launch, refuse, tl, wait_for_all, wait_for_inputs
from graphopt.kernels._tuning import Config, choose

SCHEMA = "(Tensor x, Tensor mask) -> Tensor"


def _shape(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (1, N, ...), any dtype.
        mask: (B, S), bool: where the tokens belong, in their order.

    Returns:
        An empty (B, S, ...) of x's dtype.

    Raises:
        ValueError: x is no batch of one sequence, or mask is no matrix of bool.
    """
    fits = x.dim() >= 2 and x.shape[0] == 1
    require(fits, f"unpack_tokens: x must be (1, tokens, ...), not {shape_of(x)}")
    fits = mask.dim() == 2 and mask.dtype == torch.bool
    given = f"{shape_of(mask)} {mask.dtype}"
    require(fits, f"unpack_tokens: mask must be (batch, length) of bool, not {given}")
    return x.new_empty((*mask.shape, *x.shape[2:]))


def _reference(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    tokens = x.shape[1]
    rank = mask.flatten().cumsum(0) - 1
    at = torch.where(mask.flatten(), rank, tokens).clamp_max(tokens)
    rows = torch.cat([x.flatten(0, 1), x.new_zeros((1, *x.shape[2:]))])
    return rows.index_select(0, at).view(*mask.shape, *x.shape[2:])


def _cost(x: torch.Tensor, mask: torch.Tensor) -> Cost:
    """An operation an element that is written."""
    written = mask.numel() * x[0].numel() // max(x.shape[1], 1)
    return Cost(flops=float(written), bytes=nbytes(x, mask) + written * x.element_size())


@jit
def _unpack_tokens_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    mask_ptr,
    positions,
    tokens,
    stride_xr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program writes some positions, and counts the tokens in front of them."""
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    first = tl.program_id(0) * BLOCK_R
    before = trues_before(mask_ptr, first, COUNTED)
    at = first + tl.arange(0, BLOCK_R)
    true = (tl.load(mask_ptr + at, mask=at < positions, other=0) != 0).to(tl.int32)
    rank = before + tl.cumsum(true, 0) - 1
    there = (true != 0) & (rank < tokens)
    row, column, seen = row_tile(positions, D, BLOCK_R, BLOCK_D)
    taken = row_pointers(x_ptr, rank[:, None], column, stride_xr)
    found = tl.load(taken, mask=seen & there[:, None], other=0)
    tl.store(row_pointers(out_ptr, row, column, D), found, mask=seen)


def _configs(features: int) -> list[Config]:
    """As many positions as fit: each program reads the mask in front of its own."""
    block = power_of_two(features)
    together = [rows for rows in (32, 16, 8, 64) if rows * block <= LONGEST] or [1]
    shapes = [(rows, warps) for rows in together for warps in (8, 4)]
    return [Config({"BLOCK_R": rows, "BLOCK_D": block, "COUNTED": 512 * w}, w) for rows, w in shapes]


def _launch(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions, tokens, features = mask.numel(), x.shape[1], x.shape[2:].numel()
    out = x.new_empty((*mask.shape, *x.shape[2:]))
    if out.numel() == 0:
        return out
    x_ND = as_rows(x.reshape(tokens, features))
    key = (positions, tokens, features, x.dtype)
    config = choose(_unpack_tokens_kernel, x.device, key, _configs(features))
    grid = (-(-positions // config.tiles["BLOCK_R"]),)
    args = (out, x_ND, mask.contiguous(), positions, tokens, x_ND.stride(0))
    launch(_unpack_tokens_kernel, grid, *args, D=features, **config.options)
    return out


def _refuses(x: torch.Tensor, mask: torch.Tensor) -> str | None:
    if mask.numel() >= 2**31:
        return f"{mask.numel()} positions are more than 32 bits number"
    if x.is_complex():
        return "complex numbers are not loaded"
    return refuse(x, mask) or refuse_row(x.shape[2:].numel())


def _onnx(x: Value, mask: Value) -> Any:
    """A Gather of rows, of which one is zero: ScatterND would write all of the zeros first."""
    rows, flat = op.Squeeze(x, [0]), op.Reshape(mask, [-1])
    tokens = op.Shape(x, start=1, end=2)
    rank = op.Sub(op.CumSum(op.Cast(flat, to=7), op.Constant(value_int=0)), op.Constant(value_int=1))
    at = op.Min(op.Where(flat, rank, tokens), tokens)
    shape = op.Concat(op.Constant(value_ints=[1]), op.Shape(rows, start=1), axis=0)
    zeros = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), shape)
    return op.Gather(op.Concat(rows, zeros, axis=0), op.Reshape(at, op.Shape(mask)))


def _samples() -> Iterator[Sample]:
    holes = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
    yield Sample((torch.randn(1, 4, 24), holes[:1]), label="one sequence, more tokens than places")
    yield Sample((torch.randn(1, 7, 24), holes), label="holes, an empty sequence, padding on the left")
    yield Sample((torch.randn(1, 15, 4, 8), torch.ones_like(holes)), label="heads, no padding")
    yield Sample((torch.randn(1, 5, 16), holes), label="fewer tokens than places")
    yield Sample((1e3 * torch.randn(1, 7, 16), holes), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, mask = torch.randn(1, 7, 24), torch.ones(2, 5, dtype=torch.bool)
    yield BadSample((torch.cat([x, x]), mask), match="x must be")
    yield BadSample((x, mask.long()), match="mask must be")
    yield BadSample((x, mask[0]), match="mask must be")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("unpack_tokens", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
