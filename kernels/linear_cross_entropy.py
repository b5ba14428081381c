"""The cross-entropy of a projection, without all of its logits at once: the loss of a language model.

    logits = x @ weight.T + bias
    out = reduce over n of (log(sum_v(exp(logits_nv))) - logits_n,target_n), target_n != ignore_index

At a vocabulary of 128k the logits of 8k tokens are 4 GB in float32; here a block of rows exists at a time.

Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (arXiv:2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels._onnx import Value, linear, op
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100,"
    ' str reduction="mean", bool float32=False) -> Tensor'
)

_REDUCTIONS = ("none", "mean", "sum")
_BLOCK = 1 << 24  # logits at a time: 64 MB in float32


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    float32: bool = False,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (N, D), floating.
        weight: (V, D), x's dtype.
        bias: (V,), x's dtype; None for zeros.
        target: (N,), int64: classes below V, or ``ignore_index``.
        ignore_index: the target of rows that do not count.
        reduction: "none", "mean" over the rows that count, or "sum".
        float32: whether the logits are cast to float32 before the loss.

    Returns:
        An empty (N,) for "none", else a scalar; of x's dtype, or float32.

    Raises:
        ValueError: a shape or dtype does not fit, or the reduction is not known.
    """
    name = "linear_cross_entropy"
    require(reduction in _REDUCTIONS, f"{name}: reduction is one of {_REDUCTIONS}, not {reduction!r}")
    require_floating(name, x=x, weight=weight, bias=bias)
    fits = x.dim() == 2 and weight.dim() == 2 and weight.shape[1] == x.shape[1]
    require(fits, f"{name}: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    fits = bias is None or bias.shape == weight.shape[:1]
    require(fits, f"{name}: bias {shape_of(bias)} does not fit weight {shape_of(weight)}")
    require(target.dtype == torch.int64, f"{name}: target must be torch.int64, not {target.dtype}")
    fits = target.dim() == 1 and target.shape[0] == x.shape[0]
    require(fits, f"{name}: target {shape_of(target)} is not one class a row of x {shape_of(x)}")
    dtype = torch.float32 if float32 else x.dtype
    return x.new_empty(tuple(target.shape) if reduction == "none" else (), dtype=dtype)


def _reference(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    float32: bool = False,
) -> torch.Tensor:
    wide = float32 and x_ND.dtype != torch.float64  # the reference in float64 stays there
    rows = max(1, _BLOCK // weight_VD.shape[0])
    losses = []
    for start in range(0, max(x_ND.shape[0], 1), rows):
        logits_RV = F.linear(x_ND[start : start + rows], weight_VD, bias_V)
        logits_RV = logits_RV.float() if wide else logits_RV
        target_R = target_N[start : start + rows]
        losses.append(F.cross_entropy(logits_RV, target_R, ignore_index=ignore_index, reduction="none"))
    loss_N = torch.cat(losses)
    if reduction == "none":
        return loss_N
    total = loss_N.sum()
    return total if reduction == "sum" else total / (target_N != ignore_index).sum()


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    float32: bool = False,
) -> Cost:
    """One matrix product; the loss is not worth counting beside it, and no logit is written."""
    written = (x.shape[0] if reduction == "none" else 1) * x.element_size()
    return Cost(flops=2.0 * x.shape[0] * weight.numel(), bytes=nbytes(x, weight, bias, target) + written)


def _onnx(
    x: Value,
    weight: Value,
    bias: Value | None,
    target: Value,
    ignore_index: int = -100,
    reduction: str = "mean",
    float32: bool = False,
) -> Any:
    """Gemm, LogSoftmax and a lookup, with all logits: ONNX has no loss that takes the product in.

    ONNX Runtime expands SoftmaxCrossEntropyLoss into a lookup that fails on a target of -100 (1.31).
    """
    logits = linear(x, weight, bias)
    logits = op.Cast(logits, to=1) if float32 else logits
    counts = op.Not(op.Equal(target, op.Constant(value_int=ignore_index)))
    column = op.Constant(value_ints=[1])
    known = op.Unsqueeze(op.Where(counts, target, op.Constant(value_int=0)), column)
    chosen = op.Squeeze(op.GatherElements(op.LogSoftmax(logits, axis=-1), known, axis=1), column)
    loss = op.Where(counts, op.Neg(chosen), op.CastLike(op.Constant(value_float=0.0), logits))
    if reduction == "none":
        return loss
    total = op.ReduceSum(loss, keepdims=0)
    return (
        total if reduction == "sum" else op.Div(total, op.ReduceSum(op.CastLike(counts, logits), keepdims=0))
    )


def _samples() -> Iterator[Sample]:
    x, weight, bias = torch.randn(6, 12), torch.randn(23, 12) / 12**0.5, torch.randn(23)
    target = torch.tensor([3, -100, 0, 22, 7, -100])
    yield Sample((x, weight, None, target), label="a language model's")
    yield Sample((x, weight, bias, target.clamp(min=0), 7, "sum"), label="bias, sum, another index")
    yield Sample((x, weight, bias, target, -100, "none"), label="no reduction")
    yield Sample((1e2 * x, weight, bias, target), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, weight, target = torch.randn(6, 12), torch.randn(23, 12), torch.arange(6)
    yield BadSample((x, weight, None, target, -100, "max"), match="reduction is one of")
    yield BadSample((x, weight.T, None, target), match="does not fit x")
    yield BadSample((x, weight, x[0], target), match=r"bias \(12,\) does not fit")
    yield BadSample((x, weight, None, target.int()), match="target must be torch.int64")
    yield BadSample((x, weight, None, target[:2]), match=r"target \(2,\) is not one class a row")


OP = register(Op("linear_cross_entropy", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
