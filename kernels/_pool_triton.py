"""Pooling of images that are channels last, in Triton: the largest value of a window, the mean of an image.

Launchers of ``aten.max_pool2d`` and ``aten.adaptive_avg_pool2d``. PyTorch's own kernel for the former also
writes the places of the largest values, 8 bytes each, which inference throws away: of (64, 64, 112, 112) by
3 x 3, stride 2, in float16 it takes 223 us on an H100, where its input and result take 43 us at 3 TB/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.kernels._rows import power_of_two
from graphopt.kernels._shape import is_channels_last
from graphopt.kernels._triton import jit, launch, processors, refuse, tl, wait_for_all, wait_for_inputs
from graphopt.kernels._tuning import Config, choose

_LARGEST_WINDOW = 32  # pixels: the kernel spells out each
_LARGEST_IMAGE = 2**31  # elements: places inside of one are counted in 32 bits

# The largest value of each window


@jit
def _max_pool_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    stride_xn,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    image = pixel // (out_height * out_width)
    inner = pixel % (out_height * out_width)
    top = inner // out_width * step_h - pad_h
    left = inner % out_width * step_w - pad_w
    image_ptrs = x_ptr + (image.to(tl.int64) * stride_xn)[:, None] + channel[None, :]
    wait_for_inputs(PDL)
    most = tl.full((BLOCK_P, BLOCK_C), -float("inf"), tl.float32)
    for i in tl.static_range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            h, w = top + i * dilation_h, left + j * dilation_w
            seen = there & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            place = ((h * width + w) * channels)[:, None]
            value = tl.load(image_ptrs + place, mask=seen, other=-float("inf")).to(tl.float32)
            most = tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
    offsets = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out_ptr + offsets, most.to(out_ptr.dtype.element_ty), mask=there)


def max_pool(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> torch.Tensor:
    """The launcher of ``aten.max_pool2d``: its arguments and result."""
    kernel, steps, pads, dilations = map(_pair, (kernel_size, stride or kernel_size, padding, dilation))
    batch, channels, *sizes = x.shape
    geometry = zip(sizes, kernel, steps, pads, dilations, strict=True)
    height, width = (_windows(*numbers, ceil_mode) for numbers in geometry)
    out = x.new_empty((batch, height, width, channels))
    pixels = batch * height * width
    key = pixels, channels, *sizes, *kernel, *steps, x.dtype
    config = choose(_max_pool_kernel, x.device, key, _max_configs(channels))
    grid = -(-pixels // config.tiles["BLOCK_P"]), -(-channels // config.tiles["BLOCK_C"])
    numbers = pixels, channels, *sizes, height, width, x.stride(0), *steps, *pads, *dilations
    constants = {"KERNEL_H": kernel[0], "KERNEL_W": kernel[1], **config.options}
    launch(_max_pool_kernel, grid, out, x, *numbers, **constants)
    return out.permute(0, 3, 1, 2)


def _windows(size: int, kernel: int, step: int, pad: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows there are along a dimension; in ceil mode the last may end outside, but not begin."""
    room = size + 2 * pad - dilation * (kernel - 1) - 1
    count = -(-room // step) + 1 if ceil_mode else room // step + 1
    return count - 1 if ceil_mode and (count - 1) * step >= size + pad else count


def _max_configs(channels: int) -> list[Config]:
    """Eight or sixteen elements of each pixel of a window a thread."""
    block = min(power_of_two(channels), 64)
    tiles = [(1024, 4), (2048, 4), (2048, 8), (512, 2), (4096, 8)]
    return [Config({"BLOCK_P": size // block, "BLOCK_C": block}, warps) for size, warps in tiles]


def refuse_max_pool(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> str | None:
    """Why ``max_pool`` cannot take its arguments, or None."""
    if math.prod(_pair(kernel_size)) > _LARGEST_WINDOW:
        return f"a window has more than {_LARGEST_WINDOW} pixels"
    return _refuse_images(x)


# The mean of each image


@jit
def _mean_pool_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    pixels,
    channels,
    stride_xn,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes some channels of one image, all its pixels."""
    wait_for_all(PDL)
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + image * stride_xn + channel[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    wait_for_inputs(PDL)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        seen = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        total += tl.load(x_ptrs + (pixel * channels)[:, None], mask=seen, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / pixels
    tl.store(out_ptr + image * channels + channel, mean.to(out_ptr.dtype.element_ty), mask=channel < channels)


def mean_pool(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    """The launcher of ``aten.adaptive_avg_pool2d`` to one pixel: its arguments and result."""
    batch, channels, height, width = x.shape
    out = x.new_empty((batch, 1, 1, channels))
    key = batch, channels, height * width, x.dtype
    configs = _mean_configs(batch, channels, height * width, x.device)
    config = choose(_mean_pool_kernel, x.device, key, configs)
    grid = -(-channels // config.tiles["BLOCK_C"]), batch
    launch(_mean_pool_kernel, grid, out, x, height * width, channels, x.stride(0), **config.options)
    return out.permute(0, 3, 1, 2)


def _mean_configs(batch: int, channels: int, pixels: int, device: torch.device) -> list[Config]:
    """Few channels a program where there are few images, and few turns: a turn waits for its loads."""
    few = batch * channels < 2 * 64 * processors(device)
    tiles = [(64, 32, 4), (64, 64, 4), (32, 64, 4), (128, 32, 8), (32, 128, 4)]
    tiles.sort(key=lambda tile: tile[:2] != ((64, 32) if few else (64, 64)))
    most, widest = power_of_two(pixels), power_of_two(channels)
    return [Config({"BLOCK_P": min(p, most), "BLOCK_C": min(c, widest)}, warps) for p, c, warps in tiles]


def refuse_mean_pool(x: torch.Tensor, output_size: Sequence[int]) -> str | None:
    """Why ``mean_pool`` cannot take its arguments, or None."""
    if list(_pair(output_size)) != [1, 1]:
        return f"the result has {list(output_size)} pixels, and not one"
    if x.shape[0] > 65535:
        return f"{x.shape[0]} images are more than a grid's second axis holds"
    return _refuse_images(x)


def _refuse_images(x: torch.Tensor) -> str | None:
    if x.dim() != 4 or not is_channels_last(x):
        return "the images are not channels last"
    if not x.is_floating_point():
        return f"the images are {x.dtype}"
    if math.prod(x.shape[1:]) >= _LARGEST_IMAGE:
        return "an image has 2**31 elements or more"
    return refuse(x)


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    """One number for each spatial dimension; one may stand for both."""
    return numbers[0], numbers[-1]
