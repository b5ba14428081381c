"""A group norm and the SiLU behind it, as every residual block of a diffusion model's U-Net begins.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the channels of a group and all positions
    out = y * sigmoid(y)

Source: Wu and He, Group Normalization (arXiv:1803.08494).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.kernels._activations import ONNX
from graphopt.kernels._onnx import Value, group_norm
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of
from graphopt.kernels._triton import jit, launch, processors, refuse, tl, wait_for_all, wait_for_inputs
from graphopt.kernels._tuning import Config, choose

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


@jit
def _moments(x, seen, count):  # type: ignore[no-untyped-def]
    """Mean of what is seen, and the sum of squared differences from it."""
    mean = tl.sum(tl.where(seen, x, 0.0)) / count
    centred = tl.where(seen, x - mean, 0.0)
    return mean, tl.sum(centred * centred)


@jit
def _group_moments_kernel(moments_ptr, x_ptr, length, chunks, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program takes one chunk of one group."""
    wait_for_all(PDL)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    seen = place < length
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + group.to(tl.int64) * length + place, mask=seen, other=0.0).to(tl.float32)
    mean, squares = _moments(x, seen, tl.minimum(length - chunk * BLOCK, BLOCK))
    tl.store(moments_ptr + 2 * tl.program_id(0), mean)
    tl.store(moments_ptr + 2 * tl.program_id(0) + 1, squares)


@jit
def _group_norm_silu_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    length,
    chunks,
    groups,
    positions,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one chunk of one group; without BLOCK_CHUNKS the chunk is the group."""
    wait_for_all(PDL)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    seen = place < length
    channel = group % groups * (length // positions) + place // positions
    x_ptr += group.to(tl.int64) * length
    out_ptr += group.to(tl.int64) * length
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + place, mask=seen, other=0.0).to(tl.float32)
    if BLOCK_CHUNKS == 0:
        mean, squares = _moments(x, seen, length)
    else:  # Chan's sum of the chunks' moments
        every = tl.arange(0, BLOCK_CHUNKS)
        there = every < chunks
        moment_ptrs = moments_ptr + 2 * (group * chunks + every)
        means = tl.load(moment_ptrs, mask=there, other=0.0)
        counts = tl.where(there, tl.minimum(length - every * BLOCK, BLOCK), 0).to(tl.float32)
        mean = tl.sum(means * counts) / length
        away = tl.where(there, means - mean, 0.0)
        squares = tl.sum(tl.load(moment_ptrs + 1, mask=there, other=0.0) + away * away * counts)
    y = (x - mean) * tl.rsqrt(squares / length + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channel, mask=seen, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=seen, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y * tl.sigmoid(y), mask=seen)


LONGEST_CHUNK, MOST_CHUNKS = 8192, 1024


def _configs(groups: int, length: int, device: torch.device) -> list[Config]:
    """A chunk of a group a program: shorter ones where there are too few groups for every processor."""
    whole = min(power_of_two(length), LONGEST_CHUNK)
    least = power_of_two(-(-length // MOST_CHUNKS))
    blocks = [size for size in (whole, whole // 2, whole // 4, whole // 8) if size >= max(least, 256)]
    blocks = blocks or [whole]
    enough = [size for size in blocks if groups * -(-length // size) >= 4 * processors(device)]
    first = enough[0] if enough else blocks[-1]
    blocks = [first, *(size for size in blocks if size != first)]
    return [Config({"BLOCK": size}, min(max(size // 512, 1), 16)) for size in blocks]


def _launch(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """One kernel where a program holds a group, else one for the moments of its chunks ahead of it."""
    out = x.new_empty(x.shape)
    x = x.contiguous()
    positions = math.prod(x.shape[2:])
    every, length = x.shape[0] * groups, x.shape[1] // groups * positions
    weight_C, bias_C = (x if v is None else v.contiguous() for v in (weight, bias))
    given = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    config = choose(
        _group_norm_silu_kernel,
        x.device,
        (every, length, positions, x.dtype, *given.values()),
        _configs(every, length, x.device),
    )
    chunks = -(-length // config.tiles["BLOCK"])
    grid, moments = (every * chunks,), x
    if chunks > 1:
        moments = x.new_empty((every * chunks, 2), dtype=torch.float32)
        launch(_group_moments_kernel, grid, moments, x, length, chunks, **config.options)
    blocks = power_of_two(chunks) if chunks > 1 else 0
    args = (out, x, moments, weight_C, bias_C, length, chunks, groups, positions, eps)
    launch(_group_norm_silu_kernel, grid, *args, **given, BLOCK_CHUNKS=blocks, **config.options)
    return out


def _refuses(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    length = x.numel() // max(x.shape[0] * groups, 1)
    if length > LONGEST_CHUNK * MOST_CHUNKS:
        return f"a group has {length} elements, more than {LONGEST_CHUNK * MOST_CHUNKS}"
    return refuse(x, weight, bias)


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
    yield Sample((torch.randn(2, 6, 61, 67), 2, weight, bias), label="large groups of odd size")


def _bad_samples() -> Iterator[BadSample]:
    x, weight = torch.randn(2, 6, 5, 7), torch.randn(6)
    yield BadSample((x.long(), 3), match="must be floating")
    yield BadSample((x, 4), match=r"the channels of x \(2, 6, 5, 7\) do not divide into 4 groups")
    yield BadSample((x, 3, weight[:3]), match=r"weight \(3,\) is not one value a channel")
    yield BadSample((x, 3, weight, weight[:2]), match=r"bias \(2,\) is not one value a channel")
    yield BadSample((x, 3, weight.half()), match="weight is torch.float16")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("group_norm_silu", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
