"""The logistic approximation of the Gaussian error linear unit, in CLIP's and other image models' blocks.

    out = x * sigmoid(alpha * x)

``alpha`` is 1.702 in the approximation, 1 in SiLU; any other value is Swish's.

Source: Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv:1606.08415), section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels import pointwise
from graphopt.kernels._activations import ONNX
from graphopt.kernels._onnx import Value
from graphopt.kernels._shape import nbytes, require_floating

SCHEMA = "(Tensor x, float alpha=1.702) -> Tensor"


def _shape(x: torch.Tensor, alpha: float = 1.702) -> torch.Tensor:
    """The shape rule.

    Args:
        x: any shape, floating.
        alpha: the slope of the gate.

    Returns:
        An empty tensor of x's shape.

    Raises:
        ValueError: x is not floating.
    """
    require_floating("quick_gelu", x=x)
    return x.new_empty(x.shape)


def _reference(x: torch.Tensor, alpha: float = 1.702) -> torch.Tensor:
    return (x * torch.sigmoid(alpha * x)).contiguous()


def _cost(x: torch.Tensor, alpha: float = 1.702) -> Cost:
    """Two products and a sigmoid, which counts as one, an element."""
    return Cost(flops=3.0 * x.numel(), bytes=nbytes(x, x))


TRITON = pointwise.unary(lambda x, alpha=1.702: f"quick_gelu(%0, {alpha})")


def _onnx(x: Value, alpha: float = 1.702) -> Any:
    """The node that ONNX Runtime itself makes of the two products and the sigmoid."""
    return ONNX["quick_gelu"](x, alpha)


def _samples() -> Iterator[Sample]:
    yield Sample((torch.randn(2, 5, 24),), label="CLIP")
    yield Sample((torch.randn(2, 5, 24), 0.5), label="another slope")
    yield Sample((torch.randn(7),), label="a vector of odd size")
    yield Sample((1e3 * torch.randn(2, 5),), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    yield BadSample((torch.arange(3),), match="must be floating")


OP = register(Op("quick_gelu", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
