"""Attention within sequences that lie one behind the other, without the padding between them.

    out[i, h, :] = sum_j softmax_j(scale * sum_d query[i, h, d] * key[j, h // (H // K), d]) * value[j, ...]

where j runs over the tokens of i's sequence: ``offsets[b] <= j < offsets[b + 1]`` for the b that i lies in;
with ``is_causal`` only over those with j <= i. Tokens in front of the first offset and behind the last are in
no sequence and give zeros.

Source: Dao, FlashAttention-2 (arXiv:2307.08691); the layout is that of its functions for variable length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.ir.tuning import Tuning, spelled
from graphopt.kernels._attention_triton import attend_packed, refuse_heads
from graphopt.kernels._onnx import Value, emit, op
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor offsets, SymInt longest, bool is_causal=False,"
    " float? scale=None) -> Tensor"
)


def _shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """The shape rule.

    Args:
        query: (N, H, D), the tokens of all sequences, floating.
        key: (N, K, D), query's dtype; K divides H.
        value: (N, K, E), query's dtype.
        offsets: (B + 1,), int32, ascending: where each sequence begins, and where the last one ends.
        longest: no sequence has more tokens; kernels leave out what lies beyond.
        is_causal: whether a token sees only itself and those before it.
        scale: the factor before the softmax, above zero; None is 1 / sqrt(D).

    Returns:
        An empty (N, H, E).

    Raises:
        ValueError: a rank, size, dtype or the scale does not fit.
    """
    for name, x in {"query": query, "key": key, "value": value}.items():
        require(
            x.dim() == 3, f"packed_attention: {name} must be (tokens, heads, features), not {shape_of(x)}"
        )
    require_floating("packed_attention", query=query, key=key, value=value)
    (N, H, D), K = query.shape, key.shape[1]
    fits = key.shape[0] == N and key.shape[2] == D
    require(fits, f"packed_attention: key {shape_of(key)} does not fit query {shape_of(query)}")
    fits = value.shape[:2] == key.shape[:2]
    require(fits, f"packed_attention: value {shape_of(value)} does not fit key {shape_of(key)}")
    require(H % K == 0, f"packed_attention: {K} key heads do not divide {H} query heads")
    fits = offsets.dim() == 1 and offsets.dtype == torch.int32
    given = f"{shape_of(offsets)} {offsets.dtype}"
    require(fits, f"packed_attention: offsets must be a vector of int32, not {given}")
    require(scale is None or scale > 0, f"packed_attention: scale must be above zero, not {scale}")
    return query.new_empty((N, H, value.shape[2]))


def _reference(
    query_NHD: torch.Tensor,
    key_NKD: torch.Tensor,
    value_NKE: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """In rows of the longest sequence's length, which tokens are put into and taken from.

    That is the work of the padded batch; a mask over all pairs of tokens would be N / longest times as much.
    """
    (N, H, _), E = query_NHD.shape, value_NKE.shape[2]
    token_BL = offsets[:-1, None].long() + torch.arange(longest, device=offsets.device)
    there_BL = offsets[1:, None].clamp_max(N) > token_BL
    at_BL = torch.where(there_BL, token_BL, N)  # behind the last token: zeros to read, and nobody reads it
    given = (query_NHD, key_NKD, value_NKE)
    query, key, value = (F.pad(x, (0, 0, 0, 0, 0, 1))[at_BL].transpose(1, 2) for x in given)
    seen = there_BL[:, None, None, :]
    if is_causal:
        seen = seen & torch.ones((longest, longest), dtype=torch.bool, device=offsets.device).tril()
    gqa = key_NKD.shape[1] != H
    out_BHLE = F.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=gqa)
    zeros = query_NHD.new_zeros((N + 1, H, E))
    return torch.index_put(zeros, (at_BL,), out_BHLE.transpose(1, 2))[:N]


def _cost(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> Cost:
    """As if every token saw the longest sequence: nobody reads the offsets for this."""
    (N, H, D), E = query.shape, value.shape[2]
    out = N * H * E * query.element_size()
    return Cost(flops=2.0 * N * H * int(longest) * (D + E), bytes=nbytes(query, key, value, offsets) + out)


def _refuses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> str | None:
    return refuse_heads(query, key, value)


# Whether PackedMultiHeadAttention may be taken, which only the CUDA provider has.
_PACKED: dict[Tuning, bool] = {"any": False, "cuda": True}


def _onnx(
    query: Value,
    key: Value,
    value: Value,
    offsets: Value,
    longest: Value,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    """PackedMultiHeadAttention where there is one and it can say it, else Attention in padded rows.

    It can in float16 with heads of a multiple of 8 features, which is what its memory-efficient kernel takes;
    all others unpack the tokens, and read them from the first offset on as if that were 0.
    """
    (_, heads, features), kv_heads, value_features = query.shape, key.shape[1], value.shape[2]
    aligned = all(isinstance(size, int) and size % 8 == 0 for size in (features, value_features))
    fits = aligned and query.dtype == ir.DataType.FLOAT16 and heads == kv_heads and not is_causal
    if fits and spelled(_PACKED):
        return _packed_node(query, key, value, offsets, longest, scale)
    return _padded_rows(query, key, value, offsets, is_causal, scale)


def _packed_node(
    query: Value, key: Value, value: Value, offsets: Value, longest: Value, scale: float | None
) -> Any:
    heads, begin, end = query.shape[1], op.Slice(offsets, [0], [-1]), op.Slice(offsets, [1], [2**31 - 1])
    flat = [op.Reshape(x, [0, -1]) for x in (query, key, value)]
    places = _padded_places(op.Sub(end, begin), longest)
    out = emit("PackedMultiHeadAttention", *flat, None, places, offsets, num_heads=heads, scale=scale)
    at = op.Cast(op.Range(0, op.Squeeze(op.Shape(query, end=1)), 1), to=int(ir.DataType.INT32))
    inside = op.And(
        op.GreaterOrEqual(at, op.Slice(begin, [0], [1])), op.Less(at, op.Slice(end, [-1], [2**31 - 1]))
    )
    zero = op.Constant(value=ir.tensor([0.0], dtype=query.dtype))
    return op.Where(op.Unsqueeze(inside, [1, 2]), op.Reshape(out, [0, heads, -1]), zero)


def _padded_places(lengths: Value, longest: Value) -> Any:
    """Where each token would lie in the padded batch, and behind them the places of the padding.

    Args:
        lengths: (B,), int32.
        longest: S, a number.

    Returns:
        (B, S), int32.
    """
    width = op.Reshape(longest, [1])
    count = op.Mul(op.Shape(lengths), width)
    place = op.Reshape(op.Range(0, op.Squeeze(count), 1), op.Concat(op.Shape(lengths), width, axis=0))
    position = op.Cast(op.Mod(place, width), to=int(ir.DataType.INT32))
    padding = op.GreaterOrEqual(position, op.Unsqueeze(lengths, [1]))
    order = op.Reshape(op.Where(padding, op.Add(place, count), place), [-1])
    ascending, _ = op.TopK(order, count, largest=0, sorted=1)
    return op.Cast(op.Reshape(op.Mod(ascending, count), op.Shape(place)), to=int(ir.DataType.INT32))


def _padded_rows(
    query: Value, key: Value, value: Value, offsets: Value, is_causal: bool, scale: float | None
) -> Any:
    """Attention in rows of the longest sequence's length, under a mask of keys.

    ONNX Runtime's PackedMultiHeadAttention is for CUDA alone. The tokens are gathered into such rows for this
    one node, and gathered back: rows of the real length of the longest sequence, however much padding there
    was. A mask of blocks over (N, N) needs no gathers, and N / longest times the work. There must be a
    sequence with a token: ONNX Runtime's Attention refuses a length of 0.
    """
    offsets = op.Cast(offsets, to=7)
    tokens = op.Shape(query, start=0, end=1)
    starts, ends = op.Slice(offsets, [0], [-1]), op.Slice(offsets, [1], [_END])
    lengths = op.Unsqueeze(op.Sub(ends, starts), [1])
    row = op.Range(op.Constant(value_int=0), op.ReduceMax(lengths, keepdims=0), op.Constant(value_int=1))
    there = op.Less(row, lengths)  # (B, L)
    one = op.Constant(value_ints=[1])
    token = op.Min(op.Add(op.Unsqueeze(starts, [1]), row), op.Sub(tokens, one))
    heads_first = [op.Transpose(op.Gather(x, token), perm=[0, 2, 1, 3]) for x in (query, key, value)]
    seen = op.Expand(op.Unsqueeze(there, [1, 2]), op.Concat(one, one, op.Shape(row), one, axis=0))
    attended = emit(
        "Attention", *heads_first, seen, domain="", version=23, is_causal=int(is_causal), scale=scale
    )
    rows = op.Transpose(attended, perm=[0, 2, 1, 3])
    minus = op.Constant(value_ints=[-1])
    out = op.Reshape(rows, op.Concat(minus, op.Shape(rows, start=2), axis=0))
    at = op.Range(op.Constant(value_int=0), op.Squeeze(tokens), op.Constant(value_int=1))
    behind = op.Cast(op.GreaterOrEqual(op.Unsqueeze(at, [1]), ends), to=7)
    sequence = op.ReduceSum(behind, [1], keepdims=0)  # the number of sequences that end in front of a token
    first, end = op.Slice(offsets, [0], [1]), op.Slice(offsets, [-1], [_END])
    inside = op.And(op.GreaterOrEqual(at, first), op.Less(at, end))
    row_at = op.Add(op.Mul(sequence, op.Shape(row)), op.Sub(at, op.Gather(offsets, sequence)))
    out = op.Gather(out, op.Where(inside, row_at, op.Constant(value_ints=[0])))
    return op.Where(op.Unsqueeze(inside, [1, 2]), out, op.CastLike(op.Constant(value_float=0.0), out))


_END = 2**63 - 1


def _packed(
    tokens: int, heads: int, kv_heads: int, d: int, e: int, *ends: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    query = torch.randn(tokens, heads, d), torch.randn(tokens, kv_heads, d), torch.randn(tokens, kv_heads, e)
    longest = max(end - begin for begin, end in pairwise(ends))
    return *query, torch.tensor(ends, dtype=torch.int32), longest


def _samples() -> Iterator[Sample]:
    yield Sample(_packed(19, 4, 4, 8, 8, 0, 7, 8, 19), label="three sequences")
    yield Sample(_packed(19, 4, 4, 8, 8, 0, 7, 8, 19), {"is_causal": True}, label="causal")
    yield Sample(_packed(21, 6, 2, 16, 8, 0, 5, 21), {"scale": 0.3}, label="grouped heads, narrower values")
    yield Sample(_packed(23, 4, 4, 8, 8, 2, 9, 9, 17), label="tokens in no sequence, an empty sequence")
    query, key, *rest = _packed(19, 4, 4, 8, 8, 0, 7, 19)
    yield Sample((30 * query, 30 * key, *rest), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    query, key, value, offsets, longest = _packed(19, 4, 4, 8, 8, 0, 7, 19)
    yield BadSample((query[0], key, value, offsets, longest), match="query must be")
    yield BadSample((query, key[..., :4], value, offsets, longest), match="does not fit query")
    yield BadSample((query, key, value[:4], offsets, longest), match="does not fit key")
    yield BadSample((query, key[:, :3], value[:, :3], offsets, longest), match="3 key heads do not divide 4")
    yield BadSample((query, key, value, offsets.long(), longest), match="offsets must be a vector of int32")
    yield BadSample((query, key, value, offsets, longest, False, -1.0), match="scale must be above zero")
    yield BadSample((query, key.double(), value, offsets, longest), match="key is torch.float64")


FACE = TritonFace(attend_packed, _refuses)
OP = register(Op("packed_attention", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, FACE))
