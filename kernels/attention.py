"""Scaled dot-product attention over heads that lie next to each other in memory.

    product[b, h, s, t] = scale * sum_d query[b, s, h, d] * key[b, t, h // (H // K), d]
    scores[b, h, s, t] = softcap * tanh(product[b, h, s, t] / softcap) + mask[b, h, s, t]
    out[b, s, h, :] = sum_t softmax_t(scores[b, h, s, :])[t] * value[b, t, h // (H // K), :]

A boolean mask says where to attend (True), a floating one is added. ``is_causal`` also forbids t > s, counted
from the top left. Without ``softcap`` the scores are not capped.

What is forbidden, False or -inf in the mask or later than causality allows, has no weight, and a row with
nothing to attend to gives zeros, as in torch's ``scaled_dot_product_attention``. With ``fill`` it scores that
number instead, as after ``masked_fill``: a row of nothing else is then uniform, or NaN if the fill is -inf.

Source: Vaswani et al., Attention Is All You Need (arXiv:1706.03762), equation 1; heads grouped as in Ainslie
et al., GQA (arXiv:2305.13245); capped as in Gemma 2 (arXiv:2408.00118), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from graphopt.ir.op import BadSample, Cost, Op, Sample, TritonFace, register
from graphopt.ir.tuning import Tuning, spelled
from graphopt.kernels._attention_onnx import additive_mask, full_mask, multi_head, written_out
from graphopt.kernels._attention_triton import attend, refuse_heads
from graphopt.kernels._onnx import Value, emit, op
from graphopt.kernels._shape import nbytes, require, require_floating, shape_of

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool is_causal=False, float? scale=None,"
    " float? softcap=None, float? fill=None) -> Tensor"
)
SWALLOWS = -1e30  # adding any score to a number below this one gives that number, in 24 bits and more


def _shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    fill: float | None = None,
) -> torch.Tensor:
    """The shape rule.

    Args:
        query: (B, S, H, D), floating.
        key: (B, T, K, D), query's dtype; K divides H.
        value: (B, T, K, E), query's dtype.
        mask: broadcastable to (B, H, S, T); bool, or query's dtype.
        is_causal: whether a query at s sees only keys at t <= s.
        scale: the factor before the softmax, above zero; None is 1 / sqrt(D).
        softcap: the bound of the scores before the mask, above zero; None is no bound.
        fill: the score of what is forbidden; None takes it out of the row.

    Returns:
        An empty (B, S, H, E).

    Raises:
        ValueError: a rank, size, dtype or the scale does not fit.
    """
    for name, x in {"query": query, "key": key, "value": value}.items():
        require(
            x.dim() == 4, f"attention: {name} must be (batch, length, heads, features), not {shape_of(x)}"
        )
    require_floating("attention", query=query, key=key, value=value)
    (B, S, H, D), (T, K) = query.shape, key.shape[1:3]
    fits = key.shape[0] == B and key.shape[3] == D
    require(fits, f"attention: key {shape_of(key)} does not fit query {shape_of(query)}")
    fits = value.shape[:3] == key.shape[:3]
    require(fits, f"attention: value {shape_of(value)} does not fit key {shape_of(key)}")
    require(H % K == 0, f"attention: {K} key heads do not divide {H} query heads")
    # torch scales what causality has filled with -inf, and so gives NaN for any other scale
    require(scale is None or scale > 0, f"attention: scale must be above zero, not {scale}")
    require(softcap is None or softcap > 0, f"attention: softcap must be above zero, not {softcap}")
    if mask is not None:
        dtypes = (torch.bool, query.dtype)
        require(mask.dtype in dtypes, f"attention: mask must be bool or {query.dtype}, not {mask.dtype}")
        full = (B, H, S, T)[4 - mask.dim() :] if mask.dim() <= 4 else ()
        fits = len(full) == mask.dim() and all(
            m == n or m == 1 for m, n in zip(mask.shape, full, strict=True)
        )
        require(fits, f"attention: mask {shape_of(mask)} does not broadcast to {(B, H, S, T)}")
    return query.new_empty((B, S, H, value.shape[3]))


def _reference(
    query_BSHD: torch.Tensor,
    key_BTKD: torch.Tensor,
    value_BTKE: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    fill: float | None = None,
) -> torch.Tensor:
    if query_BSHD.shape[0] == 0:  # PyTorch's kernels on a GPU return None
        return query_BSHD.new_empty((*query_BSHD.shape[:3], value_BTKE.shape[3]))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if softcap is not None or (fill is not None and not _is_swallowing(fill, query_BSHD.dtype)):
        wide = torch.promote_types(query_BSHD.dtype, torch.float32)
        scores = (query_BSHD.to(wide), key_BTKD.to(wide), mask, is_causal, scale, softcap, fill)
        return _weighted(_weights(*scores), value_BTKE.to(wide)).to(query_BSHD.dtype)
    empty = None
    if mask is not None:
        if is_causal:  # torch takes one or the other
            mask = _with_causality(mask, query_BSHD.shape[1], key_BTKD.shape[1])
        if fill == -math.inf:
            empty = ~mask.any(-1) if mask.dtype == torch.bool else (mask == -math.inf).all(-1)
        elif fill is not None:
            added = query_BSHD.new_zeros(()) if mask.dtype == torch.bool else mask
            mask = torch.where(_allowed(mask), added, fill)
    out_BHSE = F.scaled_dot_product_attention(
        query_BSHD.transpose(1, 2),
        key_BTKD.transpose(1, 2),
        value_BTKE.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal and mask is None,
        scale=scale,
        enable_gqa=query_BSHD.shape[2] != key_BTKD.shape[2],
    )
    if empty is not None:
        out_BHSE = out_BHSE.masked_fill(empty[..., None], math.nan)
    return out_BHSE.transpose(1, 2).contiguous()


def _is_swallowing(fill: float, dtype: torch.dtype) -> bool:
    """True when a score plus the fill is the fill, so that adding it is as good as filling it in."""
    return fill == -math.inf or torch.finfo(dtype).min <= fill <= SWALLOWS


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > -math.inf


def _with_causality(mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    causal_ST = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    return mask & causal_ST if mask.dtype == torch.bool else mask.masked_fill(~causal_ST, -math.inf)


def _weights(
    query_BSHD: torch.Tensor,
    key_BTKD: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    fill: float | None,
) -> torch.Tensor:
    """The softmax of the scores, (B, H, S, T)."""
    (B, S, H, D), (T, K) = query_BSHD.shape, key_BTKD.shape[1:3]
    query_BKGSD = query_BSHD.reshape(B, S, K, H // K, D).permute(0, 2, 3, 1, 4)
    key_BK1DT = key_BTKD.permute(0, 2, 3, 1)[:, :, None]
    scale = D**-0.5 if scale is None else scale
    scores_BHST = (query_BKGSD @ key_BK1DT).reshape(B, H, S, T) * scale
    if softcap is not None:
        scores_BHST = torch.tanh(scores_BHST / softcap) * softcap
    if is_causal and mask is None:
        mask = torch.ones(1, 1, S, T, dtype=torch.bool, device=key_BTKD.device).tril()
    elif is_causal and mask is not None:
        mask = _with_causality(mask, S, T)
    if mask is None:
        return torch.softmax(scores_BHST, -1)
    if mask.dtype != torch.bool:
        scores_BHST = scores_BHST + mask
    scores_BHST = torch.where(_allowed(mask), scores_BHST, -math.inf if fill is None else fill)
    weights_BHST = torch.softmax(scores_BHST, -1)
    if fill is not None:
        return weights_BHST
    return weights_BHST.masked_fill(~_allowed(mask).any(-1, keepdim=True), 0.0)


def _weighted(weights_BHST: torch.Tensor, value_BTKE: torch.Tensor) -> torch.Tensor:
    (B, H, S, T), (K, E) = weights_BHST.shape, value_BTKE.shape[2:]
    value_BK1TE = value_BTKE.transpose(1, 2)[:, :, None]
    out_BHSE = (weights_BHST.reshape(B, K, H // K, S, T) @ value_BK1TE).reshape(B, H, S, E)
    return out_BHSE.transpose(1, 2).contiguous()


def _cost(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    fill: float | None = None,
) -> Cost:
    """Two products a score; a causal mask counts the full rectangle, which few kernels halve."""
    (B, S, H, D), T, E = query.shape, key.shape[1], value.shape[3]
    out = B * S * H * E * query.element_size()
    return Cost(flops=2.0 * B * H * S * T * (D + E), bytes=nbytes(query, key, value, mask) + out)


def _refuses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    fill: float | None = None,
) -> str | None:
    return refuse_heads(query, key, value, mask)


# Whether a call with as many key heads as query heads is MultiHeadAttention, or else Attention.
_IS_MULTI_HEAD: dict[str, dict[Tuning, bool]] = {
    "free": {"any": True, "portable": False},
    "causal": {"any": False, "cuda": True},  # as many queries as keys: elsewhere they count from other ends
    "masked": {"any": False, "cuda": True},
}


def _is_multi_head(
    query: Value, key: Value, mask: Value | None, is_causal: bool, softcap: float | None, fill: float | None
) -> bool:
    if query.shape[2] != key.shape[2] or softcap is not None or fill == -math.inf:
        return False
    if mask is None and is_causal:
        length = query.shape[1]
        known = isinstance(length, int) or length.value is not None
        return known and length == key.shape[1] and spelled(_IS_MULTI_HEAD["causal"])
    return spelled(_IS_MULTI_HEAD["free" if mask is None else "masked"])


def _onnx(
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    fill: float | None = None,
) -> Any:
    """One node: MultiHeadAttention where it is the flash kernel, Attention for everything else.

    On the CPU, with a mask Attention wins, 0.63 ms against 0.79 ms for MultiHeadAttention with a bias and
    0.77 ms for separate nodes at (1, 128, 12, 64), and only Attention gives zeros for empty rows:
    MultiHeadAttention gives NaN where the bias is -inf. Without one MultiHeadAttention never writes the
    scores: 0.74 ms against 0.72 ms there, 38 ms against 46 ms at (1, 1024, 12, 64). Grouped heads Attention
    takes as they are: 0.79 ms against 5.74 with the keys of 8 heads repeated for one query of 32, 1,025 keys.
    GroupQueryAttention is level with it, 29.4 ms against 31.0 at (1, 512, 32, 64), and wants lengths for a
    mask. Float32, ONNX Runtime 1.31, one thread of an AVX-512 CPU.

    On CUDA the flash and memory-efficient kernels have been behind MultiHeadAttention for longer than behind
    Attention, and take an additive mask and causality as well.
    """
    assert query.shape is not None
    assert key.shape is not None
    heads, kv_heads = query.shape[2], key.shape[2]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise ValueError(f"attention: ONNX needs fixed numbers of heads, not {heads} and {kv_heads}")
    if mask is None and (fill is None or fill <= SWALLOWS):
        fill = None  # causality alone leaves no row without a key
    narrow = query.dtype == ir.DataType.FLOAT16  # which has no number that swallows scores but -inf
    if fill is not None and (fill > SWALLOWS or (narrow and fill > -math.inf)):
        factor = query.shape[3] ** -0.5 if scale is None else scale
        return written_out(query, key, value, mask, is_causal, factor, softcap, fill)
    if _is_multi_head(query, key, mask, is_causal, softcap, fill):
        out = multi_head(query, key, value, mask, is_causal, scale, fill)
        return op.Reshape(out, [0, 0, heads, -1])
    if mask is not None and fill is not None:
        mask, is_causal = additive_mask(mask, query, key, is_causal, fill), False
    elif mask is not None:
        mask = full_mask(mask, query, key)
    out = emit(
        "Attention",
        *(op.Reshape(x, [0, 0, -1]) for x in (query, key, value)),
        mask,
        domain="",
        version=23,
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        is_causal=int(is_causal),
        scale=scale,
        softcap=softcap,
    )
    return op.Reshape(out, [0, 0, heads, -1])


def _qkv(  # (B, S, H, D), (B, T, K, D), (B, T, K, E)
    batch: int, s: int, t: int, heads: int, kv_heads: int, d: int, e: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(batch, s, heads, d),
        torch.randn(batch, t, kv_heads, d),
        torch.randn(batch, t, kv_heads, e),
    )


def _samples() -> Iterator[Sample]:
    square = 2, 6, 6, 4, 4, 8, 8
    yield Sample(_qkv(*square), label="no mask")
    yield Sample(_qkv(2, 3, 7, 4, 4, 8, 12), label="cross attention, wider values")
    yield Sample(_qkv(*square), {"scale": 0.3}, label="scale")
    yield Sample(_qkv(*square), {"scale": 0.3, "is_causal": True}, label="scale, causal")
    yield Sample(_qkv(*square), {"is_causal": True}, label="causal")
    yield Sample(_qkv(2, 3, 7, 4, 4, 8, 8), {"is_causal": True}, label="causal, fewer queries than keys")
    yield Sample(_qkv(2, 7, 3, 4, 4, 8, 8), {"is_causal": True}, label="causal, more queries than keys")
    yield Sample(_qkv(2, 5, 5, 6, 2, 16, 16), {"is_causal": True}, label="grouped heads, causal")
    yield Sample(_qkv(2, 5, 5, 6, 2, 16, 8), label="grouped heads, narrower values")

    padding = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    padding[0, ..., 4:] = False
    yield Sample((*_qkv(*square), padding), label="key padding")
    yield Sample((*_qkv(*square), padding), {"is_causal": True}, label="key padding, causal")
    nothing = padding.clone()
    nothing[1] = False
    yield Sample((*_qkv(*square), nothing), label="key padding, one sequence all padding")
    cross = torch.rand(2, 1, 1, 7) > 0.3
    yield Sample((*_qkv(2, 3, 7, 4, 4, 8, 8), cross), label="key padding, cross attention")

    empty = torch.rand(1, 4, 6, 6) > 0.4
    empty[:, :, 2] = False
    yield Sample((*_qkv(*square), empty), label="a mask a head, empty rows")
    late = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    late[..., :3] = False
    yield Sample((*_qkv(*square), late), {"is_causal": True}, label="rows that only both masks empty")
    yield Sample((*_qkv(*square), torch.randn(1, 4, 6, 6)), label="additive bias")
    additive = torch.zeros(2, 1, 6, 6).masked_fill(torch.rand(2, 1, 6, 6) > 0.6, -torch.inf)
    additive[:, :, 1] = -torch.inf
    yield Sample((*_qkv(*square), additive), label="additive -inf, empty rows")
    lowest = torch.zeros(2, 1, 1, 6)
    lowest[0, ..., 3:] = lowest[1] = torch.finfo(torch.float32).min
    yield Sample((*_qkv(*square), lowest), label="additive lowest number, one sequence all padding")
    yield Sample(_qkv(*square), {"softcap": 0.7}, label="capped")
    yield Sample((*_qkv(2, 5, 5, 6, 2, 16, 8), None, True, 0.3, 0.7), label="capped, grouped heads, causal")
    yield Sample((*_qkv(*square), empty), {"softcap": 0.7}, label="capped, empty rows")
    yield Sample((*_qkv(*square), torch.randn(1, 4, 6, 6)), {"softcap": 0.7}, label="capped, additive bias")
    for fill in (-3.0, -1e4, torch.finfo(torch.bfloat16).min):
        yield Sample((*_qkv(*square), empty), {"fill": fill}, label=f"empty rows filled with {fill:.0e}")
        options = {"fill": fill, "is_causal": True}
        yield Sample((*_qkv(*square), nothing), options, label=f"causal, filled with {fill:.0e}")
        yield Sample((*_qkv(*square), additive), {"fill": fill}, label=f"added, filled with {fill:.0e}")
    yield Sample(_qkv(*square), {"fill": -1e4, "is_causal": True}, label="causal alone, filled")
    yield Sample((*_qkv(*square), padding), {"fill": -math.inf}, label="filled with -inf")
    query, key, value = _qkv(*square)
    yield Sample((30 * query, 30 * key, value, padding), label="large magnitudes")


def _bad_samples() -> Iterator[BadSample]:
    query, key, value = _qkv(2, 6, 6, 4, 4, 8, 8)
    yield BadSample((query[0], key, value), match="query must be")
    yield BadSample((query, key[..., :4], value), match="does not fit query")
    yield BadSample((query, key, value[:, :4]), match="does not fit key")
    yield BadSample((query, key[:, :, :3], value[:, :, :3]), match="3 key heads do not divide 4")
    yield BadSample((query, key.double(), value), match="key is torch.float64")
    yield BadSample((query.long(), key, value), match="query must be floating")
    yield BadSample((query, key, value, torch.ones(6, 5, dtype=torch.bool)), match="does not broadcast")
    yield BadSample((query, key, value, torch.ones(6, 6, dtype=torch.int64)), match="mask must be bool")
    yield BadSample((query, key, value), {"scale": -0.5}, match="scale must be above zero")
    yield BadSample((query, key, value), {"softcap": 0.0}, match="softcap must be above zero")


FACE = TritonFace(attend, _refuses)
OP = register(Op("attention", SCHEMA, _shape, _reference, _cost, _onnx, _samples, _bad_samples, FACE))
