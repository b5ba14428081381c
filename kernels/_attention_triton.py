"""Attention in Triton without ever writing the scores: the kernel and the launchers that attention ops share.

A program takes a block of queries of one head and walks over the keys with a running maximum and a running
sum of the softmax.

Sources: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867); Dao,
FlashAttention-2 (arXiv:2307.08691), algorithm 1.
"""

from __future__ import annotations

import math

import torch

from graphopt.kernels._attention_configs import blocks, padded, tail
from graphopt.kernels._triton import (
    dot,
    jit,
    last_contiguous,
    launch,
    processors,
    refuse,
    shared_memory,
    tl,
    triton,
    wait_for_all,
    wait_for_inputs,
)
from graphopt.kernels._tuning import Config, choose

WIDEST = 256  # features of a head: query, sums and a step's keys and values stay on a processor
MANY_KEYS = 256  # from which on it pays to look for the last one that a mask allows, before all else
SWALLOWS = -1e30  # a fill below it leaves no weight beside any score


@jit
def _masked(  # type: ignore[no-untyped-def]
    product,
    mask_ptr,
    s,
    t,
    S,
    T,
    stride_ms,
    stride_mt,
    scale,
    softcap,
    fill,
    MASK: tl.constexpr,
    MASK_PER_ROW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    FILLED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores, those that are forbidden filled. Only a cap, an added mask and a fill need them scaled here."""
    if CAPPED:
        product = softcap * (2 * tl.sigmoid(2 * scale / softcap * product) - 1)
    elif MASK == 2 or FILLED:
        product *= scale
    forbidden = fill if FILLED else -float("inf")
    if MASK > 0:
        if MASK_PER_ROW:
            ptrs = mask_ptr + s.to(tl.int64)[:, None] * stride_ms + t[None, :] * stride_mt
            mask = tl.load(ptrs, mask=(s < S)[:, None] & (t < T)[None, :], other=0)
        else:
            mask = tl.load(mask_ptr + t * stride_mt, mask=t < T, other=0)[None, :]
        if MASK == 2:
            mask = mask.to(tl.float32)
            product += mask
            product = tl.where(mask > -float("inf"), product, forbidden)
        else:
            product = tl.where(mask != 0, product, forbidden)
    if CAUSAL and (EDGE or FILLED):
        product = tl.where(t[None, :] <= s[:, None], product, forbidden)
    if EDGE:
        product = tl.where((t < T)[None, :], product, -float("inf"))
    return product


@jit
def _walk(  # type: ignore[no-untyped-def]
    acc,
    total,
    highest,
    query,
    key_ptr,
    value_ptr,
    mask_ptr,
    s,
    first,
    last,
    S,
    T,
    stride_kt,
    stride_vt,
    stride_ms,
    stride_mt,
    scale,
    softcap,
    fill,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_ROW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    FILLED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Queries against the keys from ``first`` to ``last``; with EDGE, some may be past what is seen."""
    SCALED: tl.constexpr = CAPPED or MASK == 2 or FILLED
    factor = 1.4426950408889634 if SCALED else scale * 1.4426950408889634  # of the exponent, to base two
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    here = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    key_ptrs = key_ptr + here * stride_kt + d[None, :]
    value_ptrs = value_ptr + here * stride_vt + e[None, :]
    for start in tl.range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        if EDGE:
            key = tl.load(key_ptrs, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        elif BLOCK_D != D:
            key = tl.load(key_ptrs, mask=(d < D)[None, :], other=0.0)
        else:
            key = tl.load(key_ptrs)
        scores = dot(query, key.T, tl.zeros((query.shape[0], BLOCK_T), tl.float32))
        scores = _masked(
            scores, mask_ptr, s, t, S, T, stride_ms, stride_mt, scale, softcap, fill,
            MASK, MASK_PER_ROW, CAUSAL, CAPPED, FILLED, EDGE,
        )  # fmt: skip
        highest_now = tl.maximum(highest, tl.max(scores, 1))
        # Where all is forbidden so far the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(highest_now == -float("inf"), 0.0, highest_now) if MASK > 0 else highest_now
        if SCALED:  # the difference first: the lowest number times log2(e) is -inf
            weights = tl.exp2((scores - base[:, None]) * factor)
        else:
            weights = tl.exp2(scores * factor - (base * factor)[:, None])
        shrink = tl.exp2((highest - base) * factor)
        if EDGE:
            value = tl.load(value_ptrs, mask=(t < T)[:, None] & (e < E)[None, :], other=0.0)
        elif BLOCK_E != E:
            value = tl.load(value_ptrs, mask=(e < E)[None, :], other=0.0)
        else:
            value = tl.load(value_ptrs)
        total = total * shrink + tl.sum(weights, 1)
        acc = dot(weights.to(value.dtype), value, acc * shrink[:, None])
        highest = highest_now
        key_ptrs += BLOCK_T * stride_kt
        value_ptrs += BLOCK_T * stride_vt
    return acc, total, highest


@jit
def _zero_outside(  # type: ignore[no-untyped-def]
    out_ptr,
    offsets_ptr,
    tokens,
    sequences,
    stride,
    E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Zeros for the tokens of no sequence, shared out among the programs of a head."""
    first, last = tl.load(offsets_ptr), tl.load(offsets_ptr + sequences)
    e = tl.arange(0, BLOCK_E)[None, :]
    for start in range(tl.program_id(0) * BLOCK_S, tokens, tl.num_programs(0) * BLOCK_S):
        i = (start + tl.arange(0, BLOCK_S))[:, None]
        outside = (i < first) | (i >= last)
        zeros = tl.zeros((BLOCK_S, BLOCK_E), out_ptr.dtype.element_ty)
        tl.store(out_ptr + i.to(tl.int64) * stride + e, zeros, mask=outside & (i < tokens) & (e < E))


@jit
def _sequence(  # type: ignore[no-untyped-def]
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    offsets_ptr,
    S,
    T,
    H,
    strides_q,
    strides_k,
    strides_v,
    E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Where the sequence of this program begins in each tensor, and how many queries and keys it has."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if offsets_ptr is not None:  # S tokens of T sequences one behind the other; one batch more for the others
        begin = tl.minimum(tl.load(offsets_ptr + tl.minimum(batch, T)), S).to(tl.int64)
        end = tl.minimum(tl.load(offsets_ptr + tl.minimum(batch + 1, T)), S).to(tl.int64)
        if batch == T:
            _zero_outside(out_ptr + head * E, offsets_ptr, S, T, H * E, E, BLOCK_S, BLOCK_E)
        query_ptr += begin * strides_q[1]
        key_ptr += begin * strides_k[1]
        value_ptr += begin * strides_v[1]
        out_ptr += begin * H * E
        S = (end - begin).to(tl.int32)
        T = S
    else:
        query_ptr += batch * strides_q[0]
        key_ptr += batch * strides_k[0]
        value_ptr += batch * strides_v[0]
        out_ptr += batch * S * H * E
    return out_ptr, query_ptr, key_ptr, value_ptr, S, T


@jit
def _reach(  # type: ignore[no-untyped-def]
    block,
    S,
    T,
    mask_ptr,
    stride_mt,
    CAUSAL: tl.constexpr,
    FILLED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Up to which key all are there and seen by all queries of the block, and up to which any are.

    BOUNDED: nothing behind the last key that a mask of keys allows has a weight.
    """
    last = tl.where(block * BLOCK_S < S, T, 0)
    inner = T // BLOCK_T * BLOCK_T
    if CAUSAL and not FILLED:
        last = tl.minimum(last, (block + 1) * BLOCK_S)
        inner = tl.minimum(inner, block * BLOCK_S // BLOCK_T * BLOCK_T)
    inner = tl.minimum(inner, last)
    if BOUNDED:
        seen = tl.zeros((512,), tl.int32)
        for start in range(0, T, 512):
            t = start + tl.arange(0, 512)
            allowed = tl.load(mask_ptr + t * stride_mt, mask=t < T, other=0) != 0
            seen = tl.maximum(seen, tl.where(allowed, t + 1, 0))
        end = tl.cdiv(tl.max(seen, 0), BLOCK_T) * BLOCK_T
        last = tl.where(end > inner, last, end)
        inner = tl.minimum(inner, last)
    return inner, last


@jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    offsets_ptr,
    S,
    T,
    H,
    strides_q,
    strides_k,
    strides_v,
    strides_m,
    scale,
    softcap,
    fill,
    D: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    MASK: tl.constexpr,
    MASK_PER_ROW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    FILLED: tl.constexpr,
    EMPTY_IS_NAN: tl.constexpr,
    BOUNDED: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_all(PDL)
    wait_for_inputs(PDL)
    out_ptr, query_ptr, key_ptr, value_ptr, S, T = _sequence(
        out_ptr, query_ptr, key_ptr, value_ptr, offsets_ptr, S, T, H,
        strides_q, strides_k, strides_v, E, BLOCK_S, BLOCK_E,
    )  # fmt: skip
    block = tl.program_id(0)
    if CAUSAL:  # the longest first
        block = tl.num_programs(0) - 1 - block
    head = tl.program_id(1)
    query_ptr += head * strides_q[2]
    key_ptr += head // GROUP * strides_k[2]
    value_ptr += head // GROUP * strides_v[2]
    if MASK > 0:
        mask_ptr += tl.program_id(2).to(tl.int64) * strides_m[0] + head * strides_m[1]
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    query_ptrs = query_ptr + s.to(tl.int64)[:, None] * strides_q[1] + d[None, :]
    query = tl.load(query_ptrs, mask=(s < S)[:, None] & (d < D)[None, :], other=0.0)

    acc = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    highest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    inner, last = _reach(block, S, T, mask_ptr, strides_m[3], CAUSAL, FILLED, BOUNDED, BLOCK_S, BLOCK_T)
    for EDGE in tl.static_range(2):
        acc, total, highest = _walk(
            acc, total, highest, query, key_ptr, value_ptr, mask_ptr, s,
            inner if EDGE else 0, last if EDGE else inner, S, T,
            strides_k[1], strides_v[1], strides_m[2], strides_m[3], scale, softcap, fill,
            D, E, TAIL if EDGE else BLOCK_T, BLOCK_D, BLOCK_E,
            MASK, MASK_PER_ROW, CAUSAL, CAPPED, FILLED, EDGE,
        )  # fmt: skip
    if MASK > 0 and not EMPTY_IS_NAN:  # a row without a key: zeros
        total = tl.where(total == 0, 1.0, total)
    out = acc / total[:, None]
    out_ptrs = out_ptr + (s.to(tl.int64) * H + head)[:, None] * E + e[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(s < S)[:, None] & (e < E)[None, :])


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    fill: float | None = None,
) -> torch.Tensor:
    """The launcher of ``kernels/attention.py``: its arguments and result."""
    (B, S, H, D), (T, K, E) = query.shape, value.shape[1:]
    out = query.new_empty((B, S, H, E))
    if T == 0:
        return out.zero_()
    query, key, value = (last_contiguous(x) for x in (query, key, value))
    strides = [x.stride()[:3] for x in (query, key, value)]
    kind = 0
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask_strides = mask.expand(B, H, S, T).stride()
    elif fill is not None and (not is_causal or fill <= SWALLOWS):
        fill = None  # nothing is forbidden, or causality alone leaves no row without a key
    empty_is_nan = fill == -math.inf
    flags = {
        "MASK": kind,
        "MASK_PER_ROW": mask_strides[2] != 0,
        "CAUSAL": is_causal,
        "CAPPED": softcap is not None,
        "FILLED": fill is not None and not empty_is_nan,
        "EMPTY_IS_NAN": empty_is_nan,
    }
    constants = {"D": D, "E": E, "GROUP": H // K, **flags}
    named = B, S, T, H, D, E, query.dtype, *flags.values()
    candidates = _candidates(B * H, S, T, query, max(D, E))
    config = choose(_attention_kernel, query.device, named, candidates)
    numbers = D**-0.5 if scale is None else scale, softcap or 1.0, fill or 0.0
    args = out, query, key, value, mask, None, S, T, H, *strides, mask_strides, *map(float, numbers)
    grid = triton.cdiv(S, config.tiles["BLOCK_S"]), H, B
    by_key = kind == 1 and not (flags["MASK_PER_ROW"] or flags["FILLED"] or is_causal)
    constants["BOUNDED"] = by_key and T >= MANY_KEYS
    constants["TAIL"] = tail(T, config.tiles["BLOCK_T"], is_causal)
    launch(_attention_kernel, grid, *args, **constants, **padded(D, E), **config.options)
    return out


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """The launcher of ``kernels/packed_attention.py``: its arguments and result."""
    (N, H, D), (K, E) = query.shape, value.shape[1:]
    out = query.new_empty((N, H, E))
    query, key, value = (last_contiguous(x) for x in (query, key, value))
    strides = [(0, *x.stride()[:2]) for x in (query, key, value)]
    sequences = offsets.shape[0] - 1
    named = N, sequences, longest, H, D, E, query.dtype, is_causal
    candidates = _candidates(sequences * H, longest, longest, query, max(D, E))
    config = choose(_attention_kernel, query.device, named, candidates)
    flags = dict.fromkeys(("MASK", "MASK_PER_ROW", "CAPPED", "FILLED", "EMPTY_IS_NAN", "BOUNDED"), 0)
    constants = {"D": D, "E": E, "GROUP": H // K, **flags, "CAUSAL": is_causal, **padded(D, E)}
    numbers = float(D**-0.5 if scale is None else scale), 1.0, 0.0
    sizes = N, sequences, H
    args = out, query, key, value, None, offsets.contiguous(), *sizes, *strides, (0, 0, 0, 0), *numbers
    constants["TAIL"] = config.tiles["BLOCK_T"]  # every sequence has another length
    grid = max(triton.cdiv(longest, config.tiles["BLOCK_S"]), 1), H, sequences + 1
    launch(_attention_kernel, grid, *args, **constants, **config.options)
    return out


def _candidates(heads: int, S: int, T: int, query: torch.Tensor, width: int) -> tuple[Config, ...]:
    device = query.device
    return blocks(heads, S, T, width, query.element_size(), processors(device), shared_memory(device))


def refuse_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> str | None:
    """Why no kernel here should take these arguments, or None."""
    reason = refuse(query, key, value, mask)
    if reason is None and query.dtype == torch.float32 and query.device.type == "cuda":
        return "in float32 an exact product has no tensor cores, and TF32 is not exact"
    width = max(query.shape[-1], value.shape[-1])
    if reason is None and width > WIDEST:
        return f"a head has {width} features, more than {WIDEST}"
    return reason
