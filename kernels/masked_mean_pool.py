"""The mean over a sequence's real tokens: what makes one embedding of a sentence.

    out = sum_t(mask_t * x_t) / max(sum_t(mask_t), minimum)

Source: Reimers and Gurevych, Sentence-BERT (arXiv:1908.10084).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of
from graphopt.kernels._triton import (
    jit,
    last_contiguous,
    launch,
    processors,
    refuse,
    tl,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

SCHEMA = "(Tensor x, Tensor mask, float? minimum=None) -> Tensor"


def _shape(x: torch.Tensor, mask: torch.Tensor, minimum: float | None = None) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (B, T, D), floating.
        mask: (B, T), of any type; 1 for real tokens, or a weight for each.
        minimum: of the divisor, which keeps a sequence without tokens at 0; None divides as it is.

    Returns:
        An empty (B, D) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_floating("masked_mean_pool", x=x)
    fits = x.dim() == 3 and mask.dim() == 2 and mask.shape == x.shape[:2]
    require(fits, f"masked_mean_pool: mask {shape_of(mask)} does not fit x {shape_of(x)}")
    return x.new_empty((x.shape[0], x.shape[2]))


def _reference(x_BTD: torch.Tensor, mask_BT: torch.Tensor, minimum: float | None = None) -> torch.Tensor:
    weight_BT = mask_BT.to(x_BTD.dtype)
    total_B1 = weight_BT.sum(1, keepdim=True)
    total_B1 = total_B1 if minimum is None else total_B1.clamp_min(minimum)
    return ((x_BTD * weight_BT[..., None]).sum(1) / total_B1).contiguous()


def _cost(x: torch.Tensor, mask: torch.Tensor, minimum: float | None = None) -> Cost:
    """A multiply-add an element."""
    return Cost(flops=2.0 * x.numel(), bytes=nbytes(x, mask) + x[:, 0].numel() * x.element_size())


@jit
def _masked_mean_pool_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    mask_ptr,
    length,
    minimum,
    stride_xb,
    stride_xt,
    stride_mb,
    stride_mt,
    D: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes some features of one sequence, all its tokens."""
    wait_for_all(PDL)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += batch * stride_xb + column[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    count = tl.zeros((BLOCK_T,), tl.float32)
    wait_for_inputs(PDL)
    for start in range(0, length, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T).to(tl.int64)
        there = token < length
        weight = tl.load(mask_ptr + batch * stride_mb + token * stride_mt, mask=there, other=0)
        weight = weight.to(tl.float32).to(x_ptr.dtype.element_ty).to(tl.float32)
        seen = there[:, None] & (column[None, :] < D)
        total += tl.load(x_ptr + token[:, None] * stride_xt, mask=seen, other=0.0) * weight[:, None]
        count += weight
    divisor = tl.sum(count)
    if HAS_MINIMUM:
        divisor = tl.where(divisor < minimum, minimum, divisor)
    tl.store(out_ptr + batch * D + column, tl.sum(total, axis=0) / divisor, mask=column < D)


def _configs(batch: int, length: int, features: int, device: torch.device) -> list[Config]:
    """Few features a program where there are few sequences, and few turns: a turn waits for its loads."""
    few = batch * features < 2 * 64 * processors(device)
    shapes = [(64, 32, 4), (128, 32, 4), (128, 32, 8), (32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 4)]
    shapes.sort(key=lambda shape: shape[:2] != ((128, 32) if few else (32, 64)))
    longest, widest = power_of_two(length), power_of_two(features)
    return [Config({"BLOCK_T": min(t, longest), "BLOCK_D": min(d, widest)}, warps) for t, d, warps in shapes]


def _launch(x: torch.Tensor, mask: torch.Tensor, minimum: float | None = None) -> torch.Tensor:
    batch, length, features = x.shape
    out = x.new_empty((batch, features))
    x_BTD = last_contiguous(x)
    config = choose(
        _masked_mean_pool_kernel,
        x.device,
        (batch, length, features, x.dtype, mask.dtype),
        _configs(batch, length, features, x.device),
    )
    grid = (-(-features // config.tiles["BLOCK_D"]), batch)
    args = (out, x_BTD, mask, length, minimum or 0.0, *x_BTD.stride()[:2], *mask.stride())
    constants = {"D": features, "HAS_MINIMUM": minimum is not None}
    launch(_masked_mean_pool_kernel, grid, *args, **constants, **config.options)
    return out


def _refuses(x: torch.Tensor, mask: torch.Tensor, minimum: float | None = None) -> str | None:
    if x.shape[0] > 65535:
        return f"{x.shape[0]} sequences are more than a grid's second axis holds"
    return "the mask is complex" if mask.is_complex() else refuse(x, mask)


def _onnx(x: Value, mask: Value, minimum: float | None = None) -> Any:
    """The sum as a product of matrices, (1, T) by (T, D): one pass over x, and nothing of its size made."""
    weight = op.CastLike(mask, x)
    axis = op.Constant(value_ints=[1])
    total = op.Squeeze(op.MatMul(op.Unsqueeze(weight, axis), x), axis)
    count = op.ReduceSum(weight, axis, keepdims=1)
    if minimum is not None:
        count = op.Max(count, op.CastLike(op.Constant(value_float=minimum), x))
    return op.Div(total, count)


def _samples() -> Iterator[Sample]:
    x, mask = torch.randn(2, 5, 24), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    yield Sample((x, mask, 1e-9), label="token mask")
    yield Sample((x, mask.bool()), label="boolean mask, no minimum")
    yield Sample((x, torch.rand(2, 5) + 0.1, 0.5), label="weights")
    yield Sample((x, mask * torch.tensor([[1], [0]]), 1.0), label="no token")
    yield Sample((1e3 * x, mask.float()), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, mask = torch.randn(2, 5, 24), torch.ones(2, 5)
    yield BadSample((x.long(), mask), match="must be floating")
    yield BadSample((x, mask[:, :3]), match=r"mask \(2, 3\) does not fit x")
    yield BadSample((x[0], mask), match="does not fit x")


TRITON = TritonFace(_launch, _refuses)
OP = register(
    Op("masked_mean_pool", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON)
)
