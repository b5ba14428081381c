"""A convolution in 8 bits with steps that were found beforehand, for what comes in and for what goes out.

    x8 = (clamp(round(x / x_step) + x_zero, 0, 255) - x_zero) * x_step
    out8 = conv(x8, weight * scale) + bias * x_step * scale
    out = (clamp(round(out8 / out_step) + out_zero, 0, 255) - out_zero) * out_step

Numbers come in and go out: where one convolution follows another, the codes of the one are those of the
other, and ONNX Runtime passes them on as they are. A relu behind the convolution is its clamp, with an
``out_zero`` of 0.

The codes of x are unsigned and those of the weight signed, which is what VNNI and AMX multiply. A processor
without either adds pairs of such products in 16 bits, which saturate: there the weight must stay within 64.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference (arXiv:1712.05877), section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, register
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._shape import convolved_sizes, nbytes, require, require_floating, shape_of

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
    " int groups, float x_step, int x_zero, float out_step, int out_zero) -> Tensor"
)


def _shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_step: float,
    x_zero: int,
    out_step: float,
    out_zero: int,
) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (B, C, H, W), floating.
        weight: (O, C / groups, h, w), int8.
        scale: (O,), x's dtype.
        bias: (O,), int32, in units of ``x_step * scale``; None for zeros.
        stride: two numbers.
        padding: zeros on both sides, two numbers.
        dilation: two numbers.
        groups: of channels that do not see each other.
        x_step: between two codes of x; above 0.
        x_zero: the code of 0, from 0 to 255.
        out_step: between two codes of the result; above 0.
        out_zero: the code of 0, from 0 to 255.

    Returns:
        An empty (B, O, ...) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, or a step or a zero is none.
    """
    name = "quantized_conv"
    require_floating(name, x=x, scale=scale)
    require(weight.dtype == torch.int8, f"{name}: weight must be torch.int8, not {weight.dtype}")
    fits = bias is None or bias.dtype == torch.int32
    require(fits, f"{name}: bias must be torch.int32, not {None if bias is None else bias.dtype}")
    fits = x.dim() == 4 and weight.dim() == 4 and weight.shape[1] * groups == x.shape[1]
    require(fits, f"{name}: weight {shape_of(weight)} does not fit x {shape_of(x)}")
    for label, vector in (("scale", scale), ("bias", bias)):
        fits = vector is None or vector.shape == weight.shape[:1]
        require(fits, f"{name}: {label} {shape_of(vector)} does not fit weight {shape_of(weight)}")
    for label, numbers in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        require(len(numbers) == 2, f"{name}: {label} {list(numbers)} is not two numbers")
    for label, step, zero in (("x", x_step, x_zero), ("out", out_step, out_zero)):
        require(step > 0, f"{name}: {label}_step must be above 0, not {step}")
        require(0 <= zero <= 255, f"{name}: {label}_zero must be from 0 to 255, not {zero}")
    sizes = convolved_sizes(x, weight, stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *sizes))


def _reference(
    x: torch.Tensor,
    weight_OChw: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_step: float,
    x_zero: int,
    out_step: float,
    out_zero: int,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = scale_O.to(wide)
    bias = None if bias_O is None else bias_O.to(wide) * (scale * x_step)
    weight = weight_OChw.to(wide) * scale[:, None, None, None]
    rounded = _rounded(x.to(wide), x_step, x_zero)
    out = F.conv2d(rounded, weight, bias, stride, padding, dilation, groups)
    return _rounded(out, out_step, out_zero).to(x.dtype).contiguous()


def _rounded(x: torch.Tensor, step: float, zero: int) -> torch.Tensor:
    """Numbers as the 256 codes hold them."""
    return (x / step).round_().clamp_(-zero, 255 - zero).mul_(step)


def _cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_step: float,
    x_zero: int,
    out_step: float,
    out_zero: int,
) -> Cost:
    """The convolution; a byte a weight is read."""
    given = (stride, padding, dilation, groups, x_step, x_zero, out_step, out_zero)
    out = _shape(x, weight, scale, bias, *given)
    return Cost(flops=2.0 * out.numel() * weight[0].numel(), bytes=nbytes(x, weight, scale, bias, out))


def _onnx(
    x: Value,
    weight: Value,
    scale: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_step: float,
    x_zero: int,
    out_step: float,
    out_zero: int,
) -> Any:
    """A Conv between QuantizeLinear and DequantizeLinear, of which ONNX Runtime makes a QLinearConv.

    It also takes out what quantizes again what was dequantized by the same step.
    """
    given, kind = x.dtype, ir.DataType.FLOAT
    x, scale = (v if v.dtype == kind else op.Cast(v, to=int(kind)) for v in (x, scale))
    operands = [_coded(x, x_step, x_zero), op.DequantizeLinear(weight, scale, axis=0)]
    if bias is not None:
        unit = op.Mul(scale, op.Constant(value_float=x_step))
        operands.append(op.DequantizeLinear(bias, unit, axis=0))
    out = op.Conv(
        *operands,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    out = _coded(out, out_step, out_zero)
    return out if given == kind else op.Cast(out, to=int(given))


def _coded(x: Value, step: float, zero: int) -> Any:
    """``_rounded`` in ONNX."""
    given = op.Constant(value_float=step), op.Constant(value=ir.tensor(zero, dtype=ir.DataType.UINT8))
    return op.DequantizeLinear(op.QuantizeLinear(x, *given), *given)


def _samples() -> Iterator[Sample]:
    # steps are powers of 2, so that sums and quotients are exact whatever computes them
    x, weight = torch.randn(2, 6, 9, 7), torch.randint(-64, 65, (8, 6, 3, 3), dtype=torch.int8)
    scale, bias = 2.0 ** torch.randint(-9, -6, (8,)), torch.randint(-999, 999, (8,), dtype=torch.int32)
    plain: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1], 1)
    steps = (2.0**-5, 120, 2.0**-4, 128)
    yield Sample((x, weight, scale, bias, *plain, *steps), label="bias")
    yield Sample((x, weight, scale, None, *plain, *steps), label="no bias")
    yield Sample((x, weight, scale, bias, *plain, 2.0**-5, 120, 2.0**-4, 0), label="relu")
    yield Sample((1e2 * x, weight, scale, bias, *plain, *steps), label="numbers out of range")
    strided: tuple[Any, ...] = ([2, 1], [0, 2], [1, 2], 2)
    yield Sample((x, weight[:, :3], scale, bias, *strided, *steps), label="strides, dilation and groups")


def _bad_samples() -> Iterator[BadSample]:
    x, weight, scale = torch.randn(2, 6, 9, 7), torch.ones(8, 6, 3, 3, dtype=torch.int8), torch.ones(8)
    plain: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1])
    steps = (0.1, 0, 0.1, 0)
    yield BadSample((x, weight.float(), scale, None, *plain, 1, *steps), match="weight must be torch.int8")
    yield BadSample((x, weight, scale, scale, *plain, 1, *steps), match="bias must be torch.int32")
    yield BadSample((x, weight, scale, None, *plain, 2, *steps), match="does not fit x")
    yield BadSample((x[0], weight, scale, None, *plain, 1, *steps), match="does not fit x")
    yield BadSample((x, weight, scale[:3], None, *plain, 1, *steps), match=r"scale \(3,\) does not fit")
    yield BadSample((x, weight, scale, None, [1], *plain[1:], 1, *steps), match=r"stride \[1\] is not two")
    yield BadSample((x, weight, scale, None, *plain, 1, 0.0, 0, 0.1, 0), match="x_step must be above 0")
    yield BadSample((x, weight, scale, None, *plain, 1, 0.1, 0, 0.1, 256), match="out_zero must be from 0")


OP = register(Op("quantized_conv", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples))
