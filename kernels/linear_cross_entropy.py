"""The cross-entropy of a projection, without all of its logits at once: the loss of a language model.

    logits = x @ weight.T + bias
    out = reduce over n of (log(sum_v(exp(logits_nv))) - logits_n,target_n), target_n != ignore_index

At a vocabulary of 128k the logits of 8k tokens are 4 GB in float32. Here a block of rows exists at a time,
and in Triton not even that: of a tile of logits a kernel keeps what the loss needs, and writes none.

Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (arXiv:2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._cross_entropy_triton import losses
from graphopt.kernels._linear_triton import refuse_product
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
    rows = _BLOCK // max(weight_VD.shape[0], 1) or 1
    losses = []
    for start in range(0, max(x_ND.shape[0], 1), rows):
        logits_RV = F.linear(x_ND[start : start + rows], weight_VD, bias_V)
        logits_RV = logits_RV.float() if wide else logits_RV
        target_R = target_N[start : start + rows]
        losses.append(F.cross_entropy(logits_RV, target_R, ignore_index=ignore_index, reduction="none"))
    loss_N = torch.cat(losses)
    if reduction == "none":
        return loss_N
    # Where the mean fits into float16 the sum need not.
    total = loss_N.sum(dtype=torch.promote_types(loss_N.dtype, torch.float32))
    reduced = total if reduction == "sum" else total / (target_N != ignore_index).sum()
    return reduced.to(loss_N.dtype)


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


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    float32: bool = False,
) -> torch.Tensor:
    return losses(
        x, weight, bias, target, ignore_index, reduction, dtype=torch.float32 if float32 else x.dtype
    )


def _refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    float32: bool = False,
) -> str | None:
    if weight.shape[0] == 0:
        return "there are no classes"
    return refuse_product(x, weight, bias, target)


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
    narrow = not float32 and x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    wide = op.Cast(loss, to=1) if narrow else loss
    total = op.ReduceSum(wide, keepdims=0)
    if reduction == "mean":
        total = op.Div(total, op.ReduceSum(op.CastLike(counts, wide), keepdims=0))
    return op.CastLike(total, loss) if narrow else total


def _samples() -> Iterator[Sample]:
    x, weight, bias = torch.randn(6, 12), torch.randn(23, 12) / 12**0.5, torch.randn(23)
    target = torch.tensor([3, -100, 0, 22, 7, -100])
    yield Sample((x, weight, None, target), label="a language model's")
    yield Sample((x, weight, bias, target.clamp(min=0), 7, "sum"), label="bias, sum, another index")
    yield Sample((x, weight, bias, target, -100, "none"), label="no reduction")
    yield Sample((1e2 * x, weight, bias, target), label="large magnitudes")
    yield Sample((1e4 * x, weight, None, target), label="a sum that float16 does not hold")


def _bad_samples() -> Iterator[BadSample]:
    x, weight, target = torch.randn(6, 12), torch.randn(23, 12), torch.arange(6)
    yield BadSample((x, weight, None, target, -100, "max"), match="reduction is one of")
    yield BadSample((x, weight.T, None, target), match="does not fit x")
    yield BadSample((x, weight, x[0], target), match=r"bias \(12,\) does not fit")
    yield BadSample((x, weight, None, target.int()), match="target must be torch.int64")
    yield BadSample((x, weight, None, target[:2]), match=r"target \(2,\) is not one class a row")


TRITON = TritonFace(_launch, _refuses)
OP = register(
    Op("linear_cross_entropy", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON)
)
