"""Attention's masks as ONNX Runtime wants them, and attention written out where its kernels cannot say it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.kernels._onnx import Value, op


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
    assert mask.shape is not None
    given, lengths = list(mask.shape), [query.shape[1], key.shape[1]]
    if mask.dtype != ir.DataType.BOOL:
        mask = _above_lowest(mask)
    if given[-2:] == lengths:
        return mask
    extents = []
    for source, length in zip((query, key), lengths, strict=True):
        if isinstance(length, int):
            extents.append(length)
        elif given and given[-1] == length:
            extents.append(op.Shape(mask, start=-1))
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
    if is_causal:  # which has a row a query and a column a key
        return added
    added.shape, added.dtype = mask.shape, dtype
    return full_mask(added, query, key)


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
