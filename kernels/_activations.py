"""The activations that ops take by name, each in torch and in ONNX.

Some have a parameter: the slope of ``leaky_relu``, the alpha of ``elu`` and ``quick_gelu``. The others ignore
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.tuning import Tuning, spelled
from graphopt.kernels._onnx import Value, emit, op
from graphopt.kernels._shape import require

Function = Callable[[torch.Tensor, float], torch.Tensor]

TORCH: dict[str, Function] = {
    "none": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": lambda x, _: F.selu(x),
    "sigmoid": lambda x, _: torch.sigmoid(x),
    "tanh": lambda x, _: torch.tanh(x),
    "softplus": lambda x, _: F.softplus(x),
    "silu": lambda x, _: F.silu(x),
    "mish": lambda x, _: F.mish(x),
    "hardswish": lambda x, _: F.hardswish(x),
    "hardsigmoid": lambda x, _: F.hardsigmoid(x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x, alpha: x * torch.sigmoid(alpha * x),
}

_HAS_QUICK_GELU: dict[Tuning, bool] = {"any": True, "portable": False}


def _quick_gelu(x: Value, alpha: float) -> Any:
    if spelled(_HAS_QUICK_GELU):
        return emit("QuickGelu", x, alpha=alpha)
    return op.Mul(x, op.Sigmoid(op.Mul(x, _number(alpha, x))))


def _number(number: float, like: Value) -> Any:
    return op.CastLike(op.Constant(value_float=number), like)


ONNX: dict[str, Callable[[Any, float], Any]] = {
    "none": lambda x, _: x,
    "relu": lambda x, _: op.Relu(x),
    "relu6": lambda x, _: op.Clip(x, _number(0.0, x), _number(6.0, x)),
    "leaky_relu": lambda x, slope: op.LeakyRelu(x, alpha=slope),
    "elu": lambda x, alpha: op.Elu(x, alpha=alpha),
    "selu": lambda x, _: op.Selu(x, alpha=1.6732632423543772, gamma=1.0507009873554805),
    "sigmoid": lambda x, _: op.Sigmoid(x),
    "tanh": lambda x, _: op.Tanh(x),
    "softplus": lambda x, _: op.Softplus(x),
    "silu": lambda x, _: op.Mul(x, op.Sigmoid(x)),  # ONNX Runtime makes one node of the two
    "mish": lambda x, _: op.Mish(x),
    "hardswish": lambda x, _: op.HardSwish(x),
    "hardsigmoid": lambda x, _: op.HardSigmoid(x, alpha=1 / 6, beta=0.5),
    "gelu": lambda x, _: op.Gelu(x),
    "gelu_tanh": lambda x, _: op.Gelu(x, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}


def finished(product: Any, activation: str, parameter: float, dtype: int) -> Any:
    """A product in float32 with the activation behind it, as a type of ONNX's."""
    product.dtype = ir.DataType.FLOAT  # what is computed has no type yet, and activations ask
    out = ONNX[activation](product, parameter)
    return out if dtype == ir.DataType.FLOAT else op.Cast(out, to=int(dtype))


def require_known(name: str, activation: str) -> None:
    """Refuse an activation that is not in the table.

    Raises:
        ValueError: it is not.
    """
    known = ", ".join(TORCH)
    require(activation in TORCH, f"{name}: activation is one of {known}, not {activation!r}")
