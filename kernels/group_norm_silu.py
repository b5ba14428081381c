"""A group norm and the SiLU behind it, as every residual block of a diffusion model's U-Net begins.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the channels of a group and all positions
    out = y * sigmoid(y)

Source: Wu and He, Group Normalization (arXiv:1803.08494).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels._activations import ONNX
from graphopt.kernels._onnx import Value, group_norm
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of

SCHEMA = "(Tensor x, int groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor"


def _shape(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (B, C, ...), floating.
        groups: that the channels are divided into.
        weight: (C,), x's dtype; None for ones.
        bias: (C,), x's dtype; None for zeros.
        eps: added to the variance.

    Returns:
        An empty tensor of x's shape.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require_floating("group_norm_silu", x=x, weight=weight, bias=bias)
    fits = x.dim() >= 2 and groups > 0 and x.shape[1] % groups == 0
    require(fits, f"group_norm_silu: the channels of x {shape_of(x)} do not divide into {groups} groups")
    for name, vector in {"weight": weight, "bias": bias}.items():
        fits = vector is None or vector.shape == x.shape[1:2]
        require(
            fits, f"group_norm_silu: {name} {shape_of(vector)} is not one value a channel of {shape_of(x)}"
        )
    return x.new_empty(x.shape)


def _reference(
    x: torch.Tensor,
    groups: int,
    weight_C: torch.Tensor | None = None,
    bias_C: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    return F.silu(F.group_norm(x, groups, weight_C, bias_C, eps)).contiguous()


def _cost(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Cost:
    """Mean and variance, a product and a sum, a sigmoid and its product."""
    return Cost(flops=10.0 * x.numel(), bytes=nbytes(x, x, weight, bias))


def _onnx(
    x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5
) -> Any:
    """ONNX Runtime has no such node on the CPU; its GroupNorm with SiLU on a GPU wants channels last."""
    return ONNX["silu"](group_norm(x, groups, weight, bias, eps), 1.0)


def _samples() -> Iterator[Sample]:
    x, weight, bias = torch.randn(2, 6, 5, 7), torch.randn(6), torch.randn(6)
    yield Sample((x, 3, weight, bias), label="an image")
    yield Sample((x, 1, weight, bias, 1e-6), label="one group")
    yield Sample((x, 6, weight), label="a group a channel, no bias")
    yield Sample((x, 2, None, bias), label="no weight")
    yield Sample((x, 2), label="neither weight nor bias")
    yield Sample((x[:, :, 0], 3, weight, bias), label="a sequence")
    yield Sample((x[:, :, 0, 0], 2, weight, bias), label="a vector")
    yield Sample((x[:, :, None], 2, weight, bias), label="a volume")
    yield Sample((1e3 * x + 1e3, 3, weight, bias), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 6, 5, 7), torch.randn(6)
    yield BadSample((x.long(), 3), match="must be floating")
    yield BadSample((x, 4), match=r"the channels of x \(2, 6, 5, 7\) do not divide into 4 groups")
    yield BadSample((x, 3, weight[:3]), match=r"weight \(3,\) is not one value a channel")
    yield BadSample((x, 3, weight, weight[:2]), match=r"bias \(2,\) is not one value a channel")
    yield BadSample((x, 3, weight.half()), match="weight is torch.float16")


OP = register(Op("group_norm_silu", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
