"""Convolutions of images that are channels last, with their epilogue, in Triton.

    out = act(conv(x, weight) + bias + residual)

An implicit product of matrices: a row is a pixel of the result, a column one of its channels, and the depth
is what the filter sees. Of one line of the filter that is KW * C numbers which lie together in memory, in the
image as in the filter, whatever KW and C are: the depth is KH such runs, cut into steps of BLOCK_K. Zeros
that a convolution pads with are not in memory; what would lie outside of a line is masked.

Inputs are multiplied as they are and summed in float32; bias, residual and activation are applied to those
sums, and the result is rounded once. Where there are too few tiles to fill the GPU the depth is cut into
parts, whose sums a second kernel adds in the order of their depth: the same bits in every run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.kernels._linear_configs import Chip, chip_of
from graphopt.kernels._linear_tile import epilogue, prefetch_weights, tile_of, with_bias
from graphopt.kernels._linear_triton import project, refuse_product, sum_splits
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._shape import convolved_sizes, is_channels_last
from graphopt.kernels._triton import (
    dot,
    jit,
    launch,
    tl,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

_FEW_PIXELS = 1024  # up to which a convolution waits for its weights more than for its image
_LARGEST = 2**31  # elements of an operand, whose places are counted in 32 bits


@jit
def _with_residual(acc, residual_ptr, offsets, inside):  # type: ignore[no-untyped-def]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return acc


@jit
def _corners(pixel, out_height, out_width, step_h, step_w, pad_h, pad_w):  # type: ignore[no-untyped-def]
    """Of each pixel of the result: its image, and the line and the place there where the filter begins."""
    inner = pixel % (out_height * out_width)
    top = inner // out_width * step_h - pad_h
    return pixel // (out_height * out_width), top, inner % out_width * step_w - pad_w


@jit
def _conv_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    pixels,
    channels,
    height,
    line,
    out_height,
    out_width,
    lines,
    run,
    stride_xn,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    parameter,
    ACTIVATION: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``line`` is W * C, ``run`` KW * C; ``step_w`` and ``pad_w`` are counted in elements of a line."""
    wait_for_all(PDL)
    tile_m, tile_n = tile_of(tl.program_id(0), pixels, channels, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps_of_run = tl.cdiv(run, BLOCK_K)
    steps = lines * steps_of_run
    each, depth = tl.cdiv(steps, SPLITS), lines * run
    first = split * each
    last = tl.minimum(first + each, steps)
    if PDL == 2 and PREFETCH:
        start = first // steps_of_run * run + first % steps_of_run * BLOCK_K
        end = tl.minimum(start + each * BLOCK_K, depth)
        prefetch_weights(weight_ptr, columns % channels, depth, start, end, BLOCK_K)
    wait_for_inputs(PDL)
    # Rows and columns past the end are taken from the start: read in bounds without a mask, never stored.
    image, top, left = _corners(rows % pixels, out_height, out_width, step_h, step_w, pad_h, pad_w)
    images = image * stride_xn + top * line + left  # places are counted in 32 bits, which saves registers
    filters = columns % channels * depth
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        at = step // steps_of_run
        k = step % steps_of_run * BLOCK_K + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + images[:, None] + (at * dilation_h * line + k)[None, :]
        weight_ptrs = weight_ptr + filters[None, :] + (at * run + k)[:, None]
        h, place = top + at * dilation_h, left[:, None] + k[None, :]
        if PADDED:
            seen = ((h >= 0) & (h < height))[:, None] & (place >= 0) & (place < line) & (k < run)[None, :]
            x = tl.load(x_ptrs, mask=seen, other=0.0)
        else:
            x = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=(k < run)[None, :], other=0.0)
        weight = tl.load(weight_ptrs) if EVEN else tl.load(weight_ptrs, mask=(k < run)[:, None], other=0.0)
        acc = dot(x, weight, acc)
    inside = (rows < pixels)[:, None] & (columns < channels)[None, :]
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    if SPLITS == 1:
        acc = with_bias(acc, bias_ptr, columns, channels)
        acc = epilogue(_with_residual(acc, residual_ptr, offsets, inside), parameter, ACTIVATION)
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        offsets += split.to(tl.int64) * pixels * channels
        tl.store(out_ptr + offsets, acc, mask=inside)


@jit
def _conv_sum_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    partial_ptr,
    bias_ptr,
    residual_ptr,
    size,
    channels,
    parameter,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offsets, inside = places[None, :], (places < size)[None, :]
    acc = sum_splits(partial_ptr, offsets, inside, size, SPLITS)
    acc = with_bias(acc, bias_ptr, places % channels, channels)
    acc = epilogue(_with_residual(acc, residual_ptr, offsets, inside), parameter, ACTIVATION)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The launcher of ``conv_activation``, and of ``aten.conv2d``: their arguments and result."""
    (batch, _, height, width), (features, channels, *kernel) = x.shape, weight.shape
    stride, padding, dilation = map(_pair, (stride, padding, dilation))
    (step_h, step_w), (pad_h, pad_w), dilation_h = stride, padding, dilation[0]
    out_height, out_width = convolved_sizes(x, weight, stride, padding, dilation)
    sizes = batch, out_height, out_width, features
    pixels, run = batch * out_height * out_width, kernel[1] * channels
    out = x.new_empty(sizes)
    key = *sizes, *x.shape[1:], *kernel, step_h, step_w, x.dtype, residual is not None
    chip = chip_of(x.device)
    candidates = conv_configs(pixels, features, run, kernel[0], x.element_size(), chip)
    config = choose(_conv_kernel, x.device, key, candidates)
    splits, block = config.tiles["SPLITS"], config.tiles["BLOCK_K"]
    made = out if splits == 1 else x.new_empty((splits, pixels, features), dtype=torch.float32)
    ends = (
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.permute(0, 2, 3, 1).contiguous(),
    )
    # the shape of the image, where the filter goes in it, and how it is stepped over a line's elements
    numbers = pixels, features, height, width * channels, out_height, out_width, kernel[0], run
    geometry = x.stride(0), step_h, step_w * channels, pad_h, pad_w * channels, dilation_h
    grid = -(-pixels // config.tiles["BLOCK_M"]) * -(-features // config.tiles["BLOCK_N"]), splits
    constants: dict[str, Any] = {"ACTIVATION": activation if splits == 1 else "none", **config.options}
    constants |= {"PADDED": pad_h + pad_w > 0, "EVEN": run % block == 0}
    constants["PREFETCH"] = pixels <= _FEW_PIXELS and block % 64 == 0
    last = ends if splits == 1 else (None, None)
    launch(_conv_kernel, grid, made, x, weight, *last, *numbers, *geometry, parameter, **constants)
    if splits > 1:
        args = out, made, *ends, pixels * features, features, parameter
        cut: dict[str, Any] = {"ACTIVATION": activation, "SPLITS": splits, "BLOCK": _SUM_BLOCK}
        launch(_conv_sum_kernel, (-(-pixels * features // _SUM_BLOCK),), *args, **cut)
    return out.permute(0, 3, 1, 2)


_SUM_BLOCK = 512


def refuse_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> str | None:
    """Why ``convolve`` cannot take its arguments, or None."""
    if x.dim() != 4 or weight.dim() != 4:
        return f"the convolution is of {weight.dim() - 2} dimensions, or has no batch"
    if groups != 1:
        return f"the channels are in {groups} groups"
    if not is_channels_last(x) or not weight.permute(0, 2, 3, 1).is_contiguous():
        return "image or filter is not channels last"
    if x.device.type == "cuda" and weight.shape[1] * x.element_size() % 16:
        # read element by element (64, 3, 224, 224) by 7 x 7 takes 315 us on an H100, float16; cuDNN 164
        return "the channels of a pixel are no whole number of 16 bytes: cuDNN reads them faster"
    if weight.shape[3] > 1 and _pair(dilation)[1] > 1:
        return "the filter is dilated along a line"
    if max(x.shape[0] * x.stride(0), weight.numel(), _results(x, weight, stride)) >= _LARGEST:
        return "an operand or the result has 2**31 elements or more"
    return refuse_product(x.permute(0, 2, 3, 1), weight, bias, residual)


def _results(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int]) -> int:
    """Pixels of the result times its channels, about."""
    return x.shape[0] * math.prod(x.shape[2:]) * weight.shape[0] // math.prod(_pair(stride))


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    """One number for each spatial dimension; one may stand for both."""
    return numbers[0], numbers[-1]


def is_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> bool:
    """Whether a convolution is the product of its pixels, as they lie in memory, and a matrix.

    A residual behind an activation is what ``linear_activation`` adds, one before it what convolutions do.
    """
    if refuse_convolution(x, weight, bias, stride, padding, dilation, groups, residual=residual) is not None:
        return False
    whole = math.prod(weight.shape[2:]) == math.prod(_pair(stride)) == 1 and not any(padding)
    together = x.permute(0, 2, 3, 1).is_contiguous()
    return whole and together and (residual is None or activation == "none")


def convolve_as_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    parameter: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``convolve`` by the kernels of ``linear_activation``, where ``is_product`` says so."""
    residual_NHWC = None if residual is None else residual.permute(0, 2, 3, 1)
    pixels = x.permute(0, 2, 3, 1)
    return project(pixels, weight.flatten(1), bias, activation, parameter, residual_NHWC).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=1024)
def conv_configs(
    pixels: int, channels: int, run: int, lines: int, itemsize: int, chip: Chip
) -> tuple[Config, ...]:
    """How a convolution may be cut up: the largest tiles that keep the processors busy, the likeliest first.

    Args:
        pixels: of all results.
        channels: of a result.
        run: numbers of an image that a line of the filter sees.
        lines: of the filter.
        itemsize: bytes of an element.
        chip: what the tiles must fit.
    """
    k = 64 if run % 64 == 0 or run > 256 else 32 if run > 16 else 16
    steps = lines * -(-run // k)
    found = []
    for m, n, warps, stages in _TILES:
        if k < 64 and m * n >= 64 * 128:  # short runs are read element by element, with a place for each
            warps = 8
        whole = -(-pixels // m) * -(-channels // n)
        parts = max(1, min(chip.processors // max(whole, 1), steps // _LEAST_STEPS, _MOST_PARTS))
        cut = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "SPLITS": 1 << parts.bit_length() - 1}
        fits = n <= max(power_of_two(channels), 16) and (m + n) * k * itemsize * stages < chip.shared
        if fits:
            found.append((whole * cut["SPLITS"] / chip.processors, Config(cut, warps, stages)))
    busy = [config for share, config in found if share >= 1 / 3] or [config for _, config in found[-2:]]
    likely = next((config for share, config in found if share >= 0.7), busy[-1])
    return (likely, *(config for config in busy[:_MOST_CONFIGS] if config != likely))


# Rows, columns, warps and stages, the largest first.
_TILES = (
    (128, 128, 8, 3),
    (128, 64, 4, 4),
    (64, 128, 4, 4),
    (64, 64, 4, 4),
    (64, 32, 4, 5),
    (32, 64, 4, 5),
    (32, 32, 4, 5),
    (16, 16, 2, 3),
)
_LEAST_STEPS = 3  # of a part of the depth
_MOST_PARTS = 16
_MOST_CONFIGS = 3  # each is compiled and timed
