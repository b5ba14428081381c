"""The first half of a gated feed-forward block: two projections, one of them the gate of the other.

    out = act(x @ gate_weight.T + gate_bias) * (x @ up_weight.T + up_bias)

``act`` is SiLU (SwiGLU), the exact GELU or its tanh form (GeGLU), ReLU (ReGLU), or the sigmoid (GLU).

Source: Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202), equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of

SCHEMA = (
    "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias=None, Tensor? up_bias=None,"
    ' str activation="silu") -> Tensor'
)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
ONNX_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": lambda x: op.Mul(x, op.Sigmoid(x)),  # Swish came with opset 24; ONNX Runtime fuses these two
    "gelu": op.Gelu,
    "gelu_tanh": partial(op.Gelu, approximate="tanh"),
    "relu": op.Relu,
    "sigmoid": op.Sigmoid,
}


def _shape(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (..., D), floating.
        gate_weight: (I, D), x's dtype.
        up_weight: (I, D), x's dtype.
        gate_bias: (I,), x's dtype; None for zeros.
        up_bias: (I,), x's dtype; None for zeros.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid".

    Returns:
        An empty (..., I) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is not known.
    """
    known = ", ".join(ACTIVATIONS)
    require(activation in ACTIVATIONS, f"gated_mlp: activation is one of {known}, not {activation!r}")
    biases = {"gate_bias": gate_bias, "up_bias": up_bias}
    require_floating("gated_mlp", x=x, gate_weight=gate_weight, up_weight=up_weight, **biases)
    fits = x.dim() >= 1 and gate_weight.dim() == 2 and gate_weight.shape[1] == x.shape[-1]
    require(fits, f"gated_mlp: gate_weight {shape_of(gate_weight)} does not fit x {shape_of(x)}")
    fits = up_weight.shape == gate_weight.shape
    require(
        fits, f"gated_mlp: up_weight {shape_of(up_weight)} differs from gate_weight {shape_of(gate_weight)}"
    )
    for name, bias in biases.items():
        fits = bias is None or bias.shape == gate_weight.shape[:1]
        require(fits, f"gated_mlp: {name} {shape_of(bias)} does not fit gate_weight {shape_of(gate_weight)}")
    return x.new_empty((*x.shape[:-1], gate_weight.shape[0]))


def _reference(
    x: torch.Tensor,
    gate_weight_ID: torch.Tensor,
    up_weight_ID: torch.Tensor,
    gate_bias_I: torch.Tensor | None = None,
    up_bias_I: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    gate = ACTIVATIONS[activation](F.linear(x, gate_weight_ID, gate_bias_I))
    return (gate * F.linear(x, up_weight_ID, up_bias_I)).contiguous()


def _cost(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> Cost:
    """Two matrix products; the activation is not worth counting beside them."""
    features, inner = x.shape[-1], gate_weight.shape[0]
    tokens = x.numel() // features
    out = tokens * inner * x.element_size()
    return Cost(
        flops=4.0 * tokens * features * inner,
        bytes=nbytes(x, gate_weight, up_weight, gate_bias, up_bias) + out,
    )


def _onnx(
    x: Value,
    gate_weight: Value,
    up_weight: Value,
    gate_bias: Value | None = None,
    up_bias: Value | None = None,
    activation: str = "silu",
) -> Any:
    """Two MatMuls on weights that ONNX Runtime transposes once, at load.

    One MatMul on both weights and a Split is no faster, nor is Gemm: 8.2 ms against 8.5 ms and 8.4 ms at
    (1, 128, 768) to 2048 in float32, and a tie at (1, 1, 2048) to 5632 (ONNX Runtime 1.31, one thread of an
    AVX-512 CPU).
    """
    gate, up = (
        product if bias is None else op.Add(product, bias)
        for product, bias in (
            (op.MatMul(x, op.Transpose(gate_weight, perm=[1, 0])), gate_bias),
            (op.MatMul(x, op.Transpose(up_weight, perm=[1, 0])), up_bias),
        )
    )
    return op.Mul(ONNX_ACTIVATIONS[activation](gate), up)


def _samples() -> Iterator[Sample]:
    x, biases = torch.randn(2, 5, 12), (torch.randn(20), torch.randn(20))
    weights = torch.randn(20, 12) / 12**0.5, torch.randn(20, 12) / 12**0.5
    for activation in ACTIVATIONS:
        yield Sample((x, *weights), {"activation": activation}, label=activation)
    yield Sample((x, *weights, *biases), label="biases")
    yield Sample((x, *weights, None, biases[1]), label="one bias")
    yield Sample((x[0, 0], *weights), label="one token")
    yield Sample((x[:, :, None], *weights, *biases, "gelu"), label="four dimensions")
    yield Sample((100 * x, *weights), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 5, 12), torch.randn(20, 12)
    yield BadSample((x, weight, weight, None, None, "tanh"), match="activation is one of silu")
    yield BadSample((x, weight.T, weight.T), match="does not fit x")
    yield BadSample((x, weight, weight[:8]), match="differs from gate_weight")
    yield BadSample((x, weight, weight, weight[0]), match=r"gate_bias \(12,\) does not fit")
    yield BadSample((x, weight, weight.double()), match="up_weight is torch.float64")


OP = register(Op("gated_mlp", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
