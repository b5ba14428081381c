"""Rotary position embedding: each pair of features turns by an angle that grows with the position.

    out[..., i] = x[..., i] * cos[i] - x[..., j] * sin[i]
    out[..., j] = x[..., j] * cos[i] + x[..., i] * sin[i]

With R features to turn, the i-th pair is (i, i + R/2), or (2i, 2i + 1) when ``interleaved``; the features
from R on pass through.

Source: Su et al., RoFormer (arXiv:2104.09864), equation 34; the split into halves is GPT-NeoX's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.ir.tuning import Tuning, spelled
from graphopt.kernels._onnx import Value, emit, op
from graphopt.kernels._rows import power_of_two
from graphopt.kernels._shape import nbytes, require, require_floating, require_weight, shape_of
from graphopt.kernels._triton import (
    jit,
    last_contiguous,
    launch,
    processors,
    refuse,
    tl,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

SCHEMA = "(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor"


def _shape(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The shape rule.

    Args:
        x: (B, S, H, D), floating.
        cos: (B or 1, S, R/2), x's dtype or float32; R <= D.
        sin: cos's shape and dtype.
        interleaved: whether a pair lies next to each other or half of R apart.

    Returns:
        An empty tensor of x's shape and dtype.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    require(x.dim() == 4, f"rope: x must be (batch, length, heads, features), not {shape_of(x)}")
    require_floating("rope", x=x)
    require_weight("rope", x, cos, "cos")
    require_floating("rope", cos=cos, sin=sin)
    fits = cos.dim() == 3 and cos.shape[1] == x.shape[1] and (cos.shape[0] == 1 or cos.shape[0] == x.shape[0])
    require(fits, f"rope: cos {shape_of(cos)} does not fit x {shape_of(x)}")
    require(sin.shape == cos.shape, f"rope: sin {shape_of(sin)} differs from cos {shape_of(cos)}")
    turning, features = 2 * cos.shape[2], x.shape[3]
    require(turning <= features, f"rope: cos turns {turning} features, but x has {features}")
    return x.new_empty(x.shape)


def _reference(
    x_BSHD: torch.Tensor, cos_BSR: torch.Tensor, sin_BSR: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    cos_BS1R, sin_BS1R = cos_BSR.unsqueeze(2), sin_BSR.unsqueeze(2)
    turning, passing = x_BSHD.split([2 * cos_BSR.shape[2], x_BSHD.shape[3] - 2 * cos_BSR.shape[2]], dim=3)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=3)
    turned = first * cos_BS1R - second * sin_BS1R, second * cos_BS1R + first * sin_BS1R
    joined = torch.stack(turned, dim=4).flatten(3) if interleaved else torch.cat(turned, dim=3)
    return torch.cat((joined.to(x_BSHD.dtype), passing), dim=3)


def _cost(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> Cost:
    """Three operations for every feature that turns."""
    turning = x.numel() // x.shape[3] * 2 * cos.shape[2]
    return Cost(flops=3.0 * turning, bytes=nbytes(x, cos, sin, x))


@jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    rows,
    length,
    heads,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_cb,
    stride_cs,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row is one head of one token. Pairs that lie together are read together, then parted in registers."""
    wait_for_all(PDL)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    head, token = row % heads, row // heads
    batch, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)[None, :]
    turning = (row < rows) & (pair < PAIRS)
    table = batch * stride_cb + position * stride_cs + pair
    x_ptr += batch * stride_xb + position * stride_xs + head * stride_xh
    out_ptr += row.to(tl.int64) * D
    wait_for_inputs(PDL)
    cos = tl.load(cos_ptr + table, mask=turning, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=turning, other=0.0).to(tl.float32)
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_P)[None, :]
        seen = (row < rows) & (both < 2 * PAIRS)
        x = tl.load(x_ptr + both, mask=seen, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (BLOCK_R, BLOCK_P, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        tl.store(out_ptr + both, tl.reshape(turned, (BLOCK_R, 2 * BLOCK_P)), mask=seen)
    else:
        first = tl.load(x_ptr + pair, mask=turning, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + PAIRS + pair, mask=turning, other=0.0).to(tl.float32)
        tl.store(out_ptr + pair, first * cos - second * sin, mask=turning)
        tl.store(out_ptr + PAIRS + pair, second * cos + first * sin, mask=turning)
    if BLOCK_REST > 0:
        rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        passing = (row < rows) & (rest < D)
        tl.store(out_ptr + rest, tl.load(x_ptr + rest, mask=passing), mask=passing)


def _configs(rows: int, features: int, device: torch.device) -> list[Config]:
    """Rows a program: 2048 elements where there are enough rows for every processor."""
    many = max(1, min(2048 // power_of_two(features), rows // (2 * processors(device))))
    first = 1 << (many.bit_length() - 1)
    return [Config({"BLOCK_R": size}, warps) for size in (first, 2 * first, 4 * first) for warps in (4, 8)]


def _launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    out = x.new_empty(x.shape)
    x_BSHD, cos, sin = last_contiguous(x), last_contiguous(cos), last_contiguous(sin)
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    _, length, heads, features = x.shape
    rows, pairs = x[..., 0].numel(), cos.shape[2]
    config = choose(
        _rope_kernel,
        x.device,
        (rows, length, heads, features, pairs, interleaved, x.dtype, cos.dtype),
        _configs(rows, features, x.device),
    )
    args = (out, x_BSHD, cos, sin, rows, length, heads, *x_BSHD.stride()[:3])
    stride_cb = 0 if cos.shape[0] == 1 else cos.stride(0)
    constants = {
        "D": features,
        "PAIRS": pairs,
        "INTERLEAVED": interleaved,
        "BLOCK_P": power_of_two(pairs),
        "BLOCK_REST": power_of_two(features - 2 * pairs) if features > 2 * pairs else 0,
    }
    grid = (-(-rows // config.tiles["BLOCK_R"]),)
    launch(_rope_kernel, grid, *args, stride_cb, cos.stride(1), **constants, **config.options)
    return out


def _refuses(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> str | None:
    if cos.shape[2] == 0:
        return "no feature turns"
    return refuse(x, cos, sin)


# Whether a table that serves a whole batch goes to com.microsoft's RotaryEmbedding, which takes it as it is;
# OpenVINO 2026.4 turns every token by the angles of the first.
_ONE_TABLE: dict[Tuning, bool] = {"any": True, "openvino": False, "portable": False}


def _onnx(x: Value, cos: Value, sin: Value, interleaved: bool = False) -> Any:
    """RotaryEmbedding on packed heads: ONNX's, or ``com.microsoft``'s where one table serves a whole batch.

    ONNX's wants cos and sin for every sequence of the batch. ``com.microsoft``'s takes one table with the
    position of its first row, so that nothing is expanded. Both take 0.10 ms at (1, 128, 32, 64) in float32,
    against 0.21 ms with transposed heads and 0.37 ms as separate nodes (ONNX Runtime 1.31, one thread of an
    AVX-512 CPU).
    """
    assert x.shape is not None
    assert cos.shape is not None
    batch, _, heads, features = x.shape
    pairs = cos.shape[2]
    kind = x.dtype
    if cos.dtype != kind:
        x = op.Cast(x, to=int(cos.dtype))
    if not (isinstance(heads, int) and isinstance(features, int) and isinstance(pairs, int)):
        raise ValueError(f"rope: ONNX needs fixed heads and features, not {heads}, {features} and {pairs}")
    turn = partial(
        emit,
        "RotaryEmbedding",
        op.Reshape(x, [0, 0, -1]),
        num_heads=heads,
        interleaved=int(interleaved),
        rotary_embedding_dim=None if 2 * pairs == features else 2 * pairs,
    )
    if cos.shape[0] != batch and spelled(_ONE_TABLE):
        out = turn(op.Constant(value_ints=[0]), op.Squeeze(cos, [0]), op.Squeeze(sin, [0]))
    else:
        if cos.shape[0] != batch:
            sizes = op.Concat(op.Shape(x, end=1), op.Shape(cos, start=1), axis=0)
            cos, sin = (op.Expand(table, sizes) for table in (cos, sin))
        out = turn(cos, sin, domain="", version=23)
    out = op.Reshape(out, [0, 0, heads, -1])
    return out if cos.dtype == kind else op.Cast(out, to=int(kind))


def _tables(
    batch: int, length: int, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:  # (batch, length, pairs)
    angles = torch.rand(batch, 1, 1) + torch.arange(length)[:, None] * 100.0 ** -torch.linspace(0, 1, pairs)
    return angles.cos(), angles.sin()


def _samples() -> Iterator[Sample]:
    x = torch.randn(2, 5, 3, 8)
    for interleaved in (False, True):
        label = "interleaved" if interleaved else "halves"
        yield Sample((x, *_tables(1, 5, 4), interleaved), label=label)
        yield Sample((x, *_tables(2, 5, 4), interleaved), label=f"{label}, a table a sequence")
        yield Sample((x, *_tables(1, 5, 2), interleaved), label=f"{label}, partial")
        yield Sample((x, *_tables(2, 5, 3), interleaved), label=f"{label}, partial, a table a sequence")
    yield Sample((x[:1], *_tables(1, 5, 4)), label="one sequence")
    yield Sample((torch.randn(2, 3, 5, 8).transpose(1, 2), *_tables(1, 5, 4)), label="transposed heads")


def _bad_samples() -> Iterator[BadSample]:
    x, (cos, sin) = torch.randn(2, 5, 3, 8), _tables(1, 5, 4)
    yield BadSample((x[0], cos, sin), match="x must be")
    yield BadSample((x, cos[:, :4], sin[:, :4]), match="does not fit x")
    yield BadSample((x, cos[0], sin[0]), match="does not fit x")
    yield BadSample((x, cos, sin[..., :2]), match="differs from cos")
    yield BadSample((x[..., :6], cos, sin), match="turns 8 features, but x has 6")
    yield BadSample((x, cos.double(), sin), match="cos is torch.float64")


TRITON = TritonFace(_launch, _refuses)
OP = register(Op("rope", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, TRITON))
