"""Rows in float8_e4m3fn, each with a scale of its own: what a product in 8 bits multiplies.

    largest = max(|x|) over the last dimension, at least 1e-30
    codes = float8(x * (448 / largest))
    scale = largest / 448
    x is about codes * scale

448 is the largest number of the format. It has 4 bits of exponent and 3 of mantissa, so that a number within
2 ** -14 of its row's largest is at most 2 ** -4 off, relative to itself. The scale is found at each call: no
input is beyond what was calibrated, and what comes out for a token does not depend on what else is in the
batch. A row with a number that is infinite or none gives no number anywhere in its products.

The arithmetic is float32's whatever x is, each operation rounded once, so that every face gives the same
codes: between two of them numbers are an eighth apart.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433), section 3; a scale a row as in
Yao et al., ZeroQuant (arXiv:2206.01861).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._float8_triton import quantized, refuse_float8
from graphopt.kernels._onnx import Value, op
from graphopt.kernels._rows import refuse_row, row_configs, row_pointers, row_tile
from graphopt.kernels._shape import nbytes, require, require_floating
from graphopt.kernels._triton import (
    as_rows,
    constant,
    jit,
    launch,
    refuse,
    tl,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import choose

SCHEMA = "(Tensor x) -> (Tensor codes, Tensor scale)"
LARGEST, _LEAST = 448.0, 1e-30  # of the format; of a row, so that one of zeros has a scale
LARGEST_CODE, LEAST_ROW = constant(LARGEST), constant(_LEAST)  # for kernels


def _shape(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape rule.

    Args:
        x: (..., K), floating.

    Returns:
        Empty ``codes``, (..., K) in float8_e4m3fn, and ``scale``, (..., 1) in float32.

    Raises:
        ValueError: x is not floating, or has no features.
    """
    require_floating("quantize_rows", x=x)
    require(x.dim() >= 1 and x.shape[-1] > 0, "quantize_rows: x has no features")
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(torch.float32).contiguous()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    most = largest.new_full((), LARGEST)  # a number of Python's is divided by as its inverse, rounded
    return (x * (most / largest)).to(torch.float8_e4m3fn), largest / most


def _cost(x: torch.Tensor) -> Cost:
    """A magnitude, a comparison and a product an element; a byte of each is written."""
    rows = x.numel() // x.shape[-1]
    return Cost(flops=3.0 * x.numel(), bytes=nbytes(x) + x.numel() + 4 * rows)


@jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    scale_ptr,
    x_ptr,
    rows,
    stride_xr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    row, column, seen = row_tile(rows, D, BLOCK_R, BLOCK_D)
    wait_for_inputs(PDL)
    x = tl.load(row_pointers(x_ptr, row, column, stride_xr), mask=seen, other=0.0).to(tl.float32)
    codes, scale = quantized(x, LARGEST_CODE, LEAST_ROW)
    tl.store(row_pointers(codes_ptr, row, column, D), codes, mask=seen)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def _launch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _shape(x)
    x_RD = as_rows(x)
    rows, features = x_RD.shape
    config = choose(
        _quantize_rows_kernel, x.device, (rows, features, x.dtype), row_configs(rows, features, x.device)
    )
    grid = (-(-rows // config.tiles["BLOCK_R"]),)
    args = codes, scale, x_RD, rows, x_RD.stride(0)
    launch(_quantize_rows_kernel, grid, *args, D=features, **config.options)
    return codes, scale


def _refuses(x: torch.Tensor) -> str | None:
    return refuse(x) or refuse_float8(x) or refuse_row(x.shape[-1])


def _onnx(x: Value) -> tuple[Any, Any]:
    """Plain nodes: QuantizeLinear knows no scale that is found at run time for each row."""
    kind = ir.DataType.FLOAT
    x = x if x.dtype == kind else op.Cast(x, to=int(kind))
    most, least = (op.Constant(value_float=value) for value in (LARGEST, _LEAST))
    largest = op.Max(op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1), least)
    codes = op.Cast(op.Mul(x, op.Div(most, largest)), to=int(ir.DataType.FLOAT8E4M3FN))
    return codes, op.Div(largest, most)


def _samples() -> Iterator[Sample]:
    x = torch.randn(2, 5, 24)
    yield Sample((x,), label="three dimensions")
    yield Sample((torch.randn(7, 37),), label="odd sizes")
    yield Sample((x[0, 0],), label="one token")
    yield Sample((1e4 * x,), label="large magnitudes")
    yield Sample((x * 10.0 ** torch.arange(-12, 12).float(),), label="more orders of magnitude than codes")
    yield Sample((torch.cat([x[:, :2], torch.zeros(2, 3, 24)], dim=1),), label="rows of zeros")


def _bad_samples() -> Iterator[BadSample]:
    yield BadSample((torch.arange(3),), match="x must be floating")
    yield BadSample((torch.tensor(1.0),), match="x has no features")
    yield BadSample((torch.randn(3, 0),), match="x has no features")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("quantize_rows", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
