"""A convolution with its epilogue: bias, shortcut and activation in the pass that writes the result.

    out = act(conv(x, weight) + bias + residual)

``act`` is one of the activations in ``_activations.py``; with "none" it is left out. The residual comes
before the activation, as in a residual network's block. The result is channels last where an operand is, as
PyTorch's convolutions have it. The Triton kernel (``_conv_triton.py``) takes images that are channels last.

Source: He et al., Deep Residual Learning for Image Recognition (arXiv:1512.03385).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._activations import ONNX, TORCH, require_known
from graphopt.kernels._conv_triton import convolve, refuse_convolution
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._shape import (
    convolved_sizes,
    memory_format,
    nbytes,
    require,
    require_floating,
    shape_of,
)

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups=1,"
    ' str activation="none", float parameter=1.0, Tensor? residual=None) -> Tensor'
)

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (B, C, ...) of one to three spatial dimensions, floating.
        weight: (O, C / groups, ...), x's dtype.
        bias: (O,), x's dtype; None for zeros.
        stride: one number a spatial dimension.
        padding: zeros on both sides, one number a spatial dimension.
        dilation: one number a spatial dimension.
        groups: of channels that do not see each other.
        activation: a name in ``_activations.py``.
        parameter: of the activation, where it has one.
        residual: the result's shape, x's dtype; None for zeros.

    Returns:
        An empty (B, O, ...) of x's dtype, channels last where x or the weight is.

    Raises:
        ValueError: a shape or dtype does not fit, or the activation is not known.
    """
    require_known("conv_activation", activation)
    require_floating("conv_activation", x=x, weight=weight, bias=bias, residual=residual)
    spatial = x.dim() - 2
    fits = spatial in _CONVOLUTIONS and weight.dim() == x.dim() and weight.shape[1] * groups == x.shape[1]
    require(fits, f"conv_activation: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    fits = bias is None or bias.shape == weight.shape[:1]
    require(fits, f"conv_activation: bias {shape_of(bias)} does not fit weight {shape_of(weight)}")
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, numbers in geometry.items():
        fits = len(numbers) == spatial
        require(fits, f"conv_activation: {name} {list(numbers)} is not one number a spatial dimension")
    sizes = convolved_sizes(x, weight, stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], *sizes)
    fits = residual is None or tuple(residual.shape) == shape
    require(fits, f"conv_activation: residual {shape_of(residual)} is not the result's {shape}")
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_O: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = _CONVOLUTIONS[x.dim() - 2](x, weight, bias_O, stride, padding, dilation, groups)
    out = TORCH[activation](out if residual is None else out + residual, parameter)
    return out.contiguous(memory_format=memory_format(x, weight))


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> Cost:
    """The convolution; its epilogue is not worth counting beside it."""
    out = _shape(x, weight, bias, stride, padding, dilation, groups)
    return Cost(
        flops=2.0 * out.numel() * weight[0].numel(),
        bytes=nbytes(x, weight, bias, residual, out),
    )


def _onnx(
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: Value | None = None,
) -> Any:
    """The standard nodes: ONNX Runtime fuses them itself, and for its blocked layouts only so.

    Its CPU provider takes relu, sigmoid, tanh, leaky_relu, relu6 and hardsigmoid into the convolution of its
    NCHWc layout, and a residual where that is in this layout too (ONNX Runtime 1.31).
    """
    out = op.Conv(
        *((x, weight) if bias is None else (x, weight, bias)),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    return ONNX[activation](out if residual is None else op.Add(out, residual), parameter)


def _samples() -> Iterator[Sample]:
    x, weight, bias = torch.randn(2, 6, 9, 7), torch.randn(8, 6, 3, 3) / 54**0.5, torch.randn(8)
    plain: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1], 1)
    for activation in TORCH:
        yield Sample((x, weight, bias, *plain, activation, 0.7), label=activation)
    yield Sample((x, weight, None, *plain, "relu"), label="no bias")
    yield Sample((x, weight, bias, *plain, "relu", 1.0, torch.randn(2, 8, 9, 7)), label="a residual")
    strided: tuple[Any, ...] = ([2, 1], [0, 2], [1, 2], 2)
    yield Sample((x, weight[:, :3], bias, *strided, "tanh"), label="strides, dilation and groups")
    yield Sample((x[:, :, 0], weight[..., 0], bias, [2], [1], [1], 1, "relu"), label="one dimension")
    volume = x[:, :, None].repeat(1, 1, 3, 1, 1)
    cube = weight[:, :, None], bias, [1] * 3, [0] * 3, [1] * 3, 1
    yield Sample((volume, *cube, "relu"), label="three dimensions")
    yield Sample((100 * x, weight, bias, *plain, "silu"), label="large magnitudes")
    last = [v.to(memory_format=torch.channels_last) for v in (x, weight, torch.randn(2, 8, 9, 7))]
    yield Sample((*last[:2], bias, *plain, "gelu"), label="channels last")
    yield Sample((*last[:2], bias, *plain, "relu", 1.0, last[2]), label="channels last, a residual")
    yield Sample((x, last[1], None, [2, 1], [0, 2], [1, 1]), label="a filter that is channels last")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 6, 9, 7), torch.randn(8, 6, 3, 3)
    plain: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1])
    yield BadSample((x, weight, None, *plain, 1, "swish"), match="activation is one of none, relu")
    yield BadSample((x, weight, None, *plain, 2), match="does not fit x")
    yield BadSample((x, weight, weight[0, 0, 0], *plain), match=r"bias \(3,\) does not fit")
    yield BadSample((x, weight, None, [1], *plain[1:]), match=r"stride \[1\] is not one number")
    yield BadSample((x, weight.half(), None, *plain), match="weight is torch.float16")
    yield BadSample((x, weight, None, *plain, 1, "relu", 1.0, x), match="is not the result's")


FACE = TritonFace(convolve, refuse_convolution)  # with its first seven arguments, that of aten.conv2d
OP = register(Op("conv_activation", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, FACE))
