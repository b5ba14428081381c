"""Attention's masks as ONNX Runtime wants them, and attention written out where its kernels cannot say it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.kernels._onnx import Value, emit, op


def of_equal_sizes(attention: Callable[..., Any]) -> Callable[..., Any]:
    """A translation of torch's own attention, with batches and heads of size 1 repeated first.

    For calls that are not graphopt's: torch broadcasts a memory that all sequences attend to, and ONNX
    Runtime's Attention wants equal sizes.

    Args:
        attention: of (..., length, features) query, key and value, and what else there is.
    """

    @functools.wraps(attention)
    def translated(query: Value, key: Value, value: Value, *args: Any, **kwargs: Any) -> Any:
        dims = (0,) if kwargs.get("enable_gqa") else (0, 1)  # grouped heads differ in number
        given = [_expanded(x, (query, key, value), dims) for x in (query, key, value)]
        return attention(*given, *args, **kwargs)

    return translated


def _expanded(x: Value, among: Sequence[Value], dims: Sequence[int]) -> Any:
    """A value whose dimensions of size 1, of those named, are as long as the longest among the values'."""
    single = {dim for dim in dims if x.shape[dim] == 1}
    longest = [
        next((y for y in among if y.shape[dim] != 1), x) if dim in single else x
        for dim in range(len(x.shape))
    ]
    if all(y is x for y in longest):
        return x
    shape = [y.shape[dim] for dim, y in enumerate(longest)]
    one = op.Constant(value_ints=[1])
    sizes = [one if y is x else op.Shape(y, start=d, end=d + 1) for d, y in enumerate(longest)]
    out = op.Expand(x, op.Concat(*sizes, axis=0))
    out.dtype, out.shape = x.dtype, ir.Shape(shape)
    return out


def full_mask(mask: Value, query: Value, key: Value) -> Any:
    """The mask as ONNX Runtime's Attention wants it: (..., S, T), where only batch and heads may be 1.

    Every layer of a model emits the same nodes here, out of the mask alone wherever that is possible, so that
    common-subexpression elimination leaves one of them.
    """
    return _expanded_mask(mask if mask.dtype == ir.DataType.BOOL else _above_lowest(mask), mask, query, key)


def _expanded_mask(mask: Value, like: Value, query: Value, key: Value) -> Any:
    """A mask of another's shape, with a row a query and a column a key."""
    assert like.shape is not None
    given, lengths = list(like.shape), [query.shape[1], key.shape[1]]
    if given[-2:] == lengths:
        return mask
    extents = []
    for source, length in zip((query, key), lengths, strict=True):
        if isinstance(length, int):
            extents.append(length)
        elif given and given[-1] == length:
            extents.append(op.Shape(like, start=-1))
        else:
            extents.append(op.Shape(source, start=1, end=2))
    return op.Expand(mask, extents)


def _above_lowest(mask: Value) -> Any:
    """A floating mask with half the lowest number of its dtype for the lowest.

    ONNX Runtime reads the lowest finite number as "masked" and zeroes a row of nothing else. In torch that
    number is one like any other, and only -inf forbids. Half of it is as far below every score.
    """
    lowest = float(mask.dtype.min)
    return op.Where(op.Equal(mask, lowest), lowest / 2, mask)


def additive_mask(mask: Value, query: Value, key: Value, is_causal: bool, fill: float) -> Any:
    """A floating mask like ``full_mask``'s, causality included, that holds the fill where it forbids.

    A row without a key is NaN where the fill is -inf: ONNX Runtime's Attention would give zeros.
    """
    dtype = query.dtype
    forbidden = _forbidden(mask, query, key, is_causal)
    low, nothing, nan = (
        op.Constant(value=ir.tensor([number], dtype=dtype))
        for number in (fill if math.isinf(fill) else float(dtype.min) / 2, 0.0, math.nan)
    )
    added = op.Where(forbidden, low, nothing if mask.dtype == ir.DataType.BOOL else _above_lowest(mask))
    if math.isinf(fill):
        added = op.Where(op.Equal(op.ReduceMax(added, [-1], keepdims=1), low), nan, added)
    # causality has a row a query and a column a key
    return added if is_causal else _expanded_mask(added, mask, query, key)


def multi_head(
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    is_causal: bool,
    scale: float | None,
    fill: float | None,
) -> Any:
    """``com.microsoft``'s MultiHeadAttention, for as many key heads as query heads.

    A mask becomes an addend, not a key padding mask: on CUDA only the kernel that writes out the scores reads
    one of those, but for lengths, which no mask is known to be. The addend is finite, for its kernels give
    NaN, or a mean of the values, where all is -inf; rows without a key are set to zero after them. Q, K and V
    stay apart: packed, only TensorRT's kernels read them as they lie, and those end at compute capability
    8.9.

    Args:
        query: (B, S, H, D).
        key: (B, T, H, D).
        value: (B, T, H, E).
        mask: as for the op, or None.
        is_causal: counted from the top left; without a mask S must be T.
        scale: the factor before the softmax; None is 1 / sqrt(D).
        fill: a finite number that swallows scores, or None for no weight at all.

    Returns:
        (B, S, H * E).
    """
    packed = [op.Reshape(x, [0, 0, -1]) for x in (query, key, value)]
    attributes: dict[str, Any] = {"num_heads": query.shape[2], "scale": scale}
    if mask is None:
        return emit("MultiHeadAttention", *packed, unidirectional=1 if is_causal else None, **attributes)
    empty = None
    if fill is not None:
        bias = additive_mask(mask, query, key, is_causal, fill)
    else:
        bias, empty = _finite_mask(mask, query, key, is_causal)
    missing = list(range(4 - max(len(mask.shape), 2)))
    bias = op.Unsqueeze(bias, missing) if missing else bias
    out = emit("MultiHeadAttention", *packed, None, None, bias, **attributes)
    if empty is None:
        return out
    empty = op.Unsqueeze(empty, missing) if missing else empty
    of_batch = not is_causal and len(mask.shape) >= 3 and list(mask.shape[-3:-1]) == [1, 1]
    rows = empty if of_batch else op.Transpose(empty, perm=[0, 2, 1, 3])
    zero = op.Constant(value=ir.tensor([0.0], dtype=query.dtype))
    apart = op.Where(rows, zero, op.Reshape(out, [0, 0, query.shape[2], -1]))
    return op.Reshape(apart, [0, 0, -1])


def _finite_mask(mask: Value, query: Value, key: Value, is_causal: bool) -> tuple[Any, Any]:
    """A mask like ``additive_mask``'s that is finite, and which of its rows allow no key, (..., 1)."""
    low, nothing = (
        op.Constant(value=ir.tensor([number], dtype=query.dtype)) for number in (query.dtype.min / 2, 0.0)
    )
    if mask.dtype == ir.DataType.BOOL and not is_causal:
        bias = op.Where(mask, nothing, low)
        empty = op.Equal(op.ReduceMax(bias, [-1], keepdims=1), low)
        return _expanded_mask(bias, mask, query, key), empty
    forbidden = _forbidden(mask, query, key, is_causal)
    bias = op.Where(forbidden, low, nothing if mask.dtype == ir.DataType.BOOL else mask)
    if not is_causal:
        bias = _expanded_mask(bias, mask, query, key)
    counted = op.Cast(forbidden, to=int(ir.DataType.INT32))
    return bias, op.Cast(op.ReduceMin(counted, [-1], keepdims=1), to=int(ir.DataType.BOOL))


def _forbidden(mask: Value | None, query: Value, key: Value, is_causal: bool) -> Any:
    """Where nothing is attended to, as broadcast booleans."""
    later = None
    if is_causal:
        queries, keys = (op.Range(0, op.Squeeze(op.Shape(x, start=1, end=2)), 1) for x in (query, key))
        later = op.Greater(keys, op.Unsqueeze(queries, [1]))
    if mask is None:
        return later
    forbidden = op.Not(mask) if mask.dtype == ir.DataType.BOOL else op.Equal(mask, -math.inf)
    return forbidden if later is None else op.Or(forbidden, later)


def written_out(
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    fill: float,
) -> Any:
    """Product, mask, softmax, product, in float32: for a fill that a key's score may reach."""
    heads, kv_heads, narrow = query.shape[2], key.shape[2], query.dtype
    query, key, value = (op.Cast(x, to=ir.DataType.FLOAT) for x in (query, key, value))
    query_BKGSD = op.Transpose(
        op.Reshape(query, [0, 0, kv_heads, heads // kv_heads, -1]), perm=[0, 2, 3, 1, 4]
    )
    key_BK1DT = op.Unsqueeze(op.Transpose(key, perm=[0, 2, 3, 1]), [2])
    value_BK1TE = op.Unsqueeze(op.Transpose(value, perm=[0, 2, 1, 3]), [2])
    product = op.Mul(op.MatMul(query_BKGSD, key_BK1DT), scale)
    if softcap is not None:
        product = op.Mul(op.Tanh(op.Div(product, softcap)), softcap)
    shape = op.Shape(product)
    heads_joined = op.Concat(
        op.Shape(product, end=1), op.Constant(value_ints=[heads]), op.Shape(product, start=3), axis=0
    )
    scores = op.Reshape(product, heads_joined)
    if mask is not None and mask.dtype != ir.DataType.BOOL:
        scores = op.Add(scores, op.Cast(mask, to=ir.DataType.FLOAT))
    forbidden = _forbidden(mask, query, key, is_causal)
    if forbidden is not None:
        scores = op.Where(forbidden, fill, scores)
    weights = op.Reshape(op.Softmax(scores, axis=-1), shape)
    out = op.Transpose(op.MatMul(weights, value_BK1TE), perm=[0, 3, 1, 2, 4])
    return op.Cast(op.Reshape(out, [0, 0, heads, -1]), to=narrow)
