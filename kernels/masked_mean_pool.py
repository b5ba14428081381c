"""The mean over a sequence's real tokens: what makes one embedding of a sentence.

    out = sum_t(mask_t * x_t) / max(sum_t(mask_t), minimum)

Source: Reimers and Gurevych, Sentence-BERT (arXiv:1908.10084).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of

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


OP = register(Op("masked_mean_pool", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
