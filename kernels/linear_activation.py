"""A projection with its epilogue: bias, activation and residual in the pass that writes the product.

    out = act(x @ weight.T + bias) + residual

``act`` is one of the activations in ``_activations.py``; with "none" it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.ir.tuning import Tuning, spelled
from graphopt.kernels._activations import ONNX, TORCH, require_known
from graphopt.kernels._linear_triton import project, refuse_product
from graphopt.kernels._onnx import Value, emit, linear, op, projection
from graphopt.kernels._shape import product_cost, require, require_floating, shape_of

SCHEMA = (
    '(Tensor x, Tensor weight, Tensor? bias=None, str activation="none", float parameter=1.0,'
    " Tensor? residual=None) -> Tensor"
)


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (..., K), floating.
        weight: (N, K), x's dtype.
        bias: (N,), x's dtype; None for zeros.
        activation: a name in ``_activations.py``.
        parameter: of the activation, where it has one.
        residual: (..., N), x's dtype; None for zeros.

    Returns:
        An empty (..., N) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is not known.
    """
    require_known("linear_activation", activation)
    require_floating("linear_activation", x=x, weight=weight, bias=bias, residual=residual)
    fits = x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    require(fits, f"linear_activation: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    fits = bias is None or bias.shape == weight.shape[:1]
    require(fits, f"linear_activation: bias {shape_of(bias)} does not fit weight {shape_of(weight)}")
    shape = (*x.shape[:-1], weight.shape[0])
    fits = residual is None or tuple(residual.shape) == shape
    require(fits, f"linear_activation: residual {shape_of(residual)} is not the result's {shape}")
    return x.new_empty(shape)


def _reference(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = TORCH[activation](F.linear(x, weight_NK, bias_N), parameter)
    return (out if residual is None else out + residual).contiguous()


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> Cost:
    """One matrix product; the epilogue is not worth counting beside it."""
    return product_cost(x, weight.shape, weight, bias, residual)


def _refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> str | None:
    return refuse_product(x, weight, bias, residual)


# The node that adds the bias and applies the activation, where it is the faster one.
_WITH_BIAS: dict[str, dict[Tuning, str | None]] = {
    "gelu": {"any": "BiasGelu", "portable": None},
    "gelu_tanh": {"any": None, "cuda": "FastGelu"},
}


def _onnx(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    activation: str = "none",
    parameter: float = 1.0,
    residual: Value | None = None,
) -> Any:
    """Gemm and the activation side by side: ONNX Runtime makes one FusedGemm of them where it has that.

    It has it for relu, sigmoid, tanh and leaky_relu. For the exact GELU the bias goes into BiasGelu: at
    (1, 128, 3072) in float32 that takes 0.32 ms against 0.36 ms for Add and Gelu; the tanh form takes 0.22 ms
    as Add and Gelu and 0.25 ms as FastGelu (ONNX Runtime 1.31, one thread of an AVX-512 CPU). The CUDA
    provider's Gemm copies a bias into its output in a kernel of its own, so there both forms take it in.
    """
    with_bias = spelled(_WITH_BIAS[activation]) if activation in _WITH_BIAS else None
    if with_bias is not None and bias is not None:
        out = emit(with_bias, linear(x, weight), bias)
    else:
        out = projection(x, weight, bias, lambda rows: ONNX[activation](rows, parameter))
    return out if residual is None else op.Add(out, residual)


def _samples() -> Iterator[Sample]:
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(20, 12) / 12**0.5, torch.randn(20)
    for activation in TORCH:
        yield Sample((x, weight, bias, activation, 0.7), label=activation)
    yield Sample((x, weight, None, "gelu"), label="gelu without a bias")
    yield Sample((x, weight, bias, "relu", 1.0, torch.randn(2, 5, 20)), label="a residual")
    yield Sample((x[:, 0], weight, bias, "tanh"), label="two dimensions")
    yield Sample((x[0, 0], weight, bias, "gelu"), label="one token")
    yield Sample((100 * x, weight, bias, "silu"), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 12), torch.randn(20, 12)
    yield BadSample((x, weight, None, "swish"), match="activation is one of none, relu")
    yield BadSample((x, weight.T), match="does not fit x")
    yield BadSample((x, weight, weight[0]), match=r"bias \(12,\) does not fit")
    yield BadSample((x, weight, weight[:, 0].half()), match="bias is torch.float16")
    yield BadSample((x, weight, None, "relu", 1.0, x), match=r"residual \(2, 5, 12\) is not the result's")


FACE = TritonFace(project, _refuses)  # with its first three arguments, that of aten.linear
OP = register(Op("linear_activation", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, FACE))
