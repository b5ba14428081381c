from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers.models.llama.modeling_llama import repeat_kv

from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes import fold_constants, remove_noops
from graphopt.passes.fuse_softmax_attention import PASS
from tests._models import padding, randn
from tests.passes._harness import Ran, program, run

B, H, S, D = 2, 4, 5, 8
# (batch, heads, tokens, features) with 4 heads, or 2 for keys and values
Q, K, V = randn(B, H, S, D), randn(B, H, S, D, seed=1), randn(B, H, S, D, seed=2)
K2, V2 = K[:, :2].clone(), V[:, :2].clone()
PADDING = padding((S, 3), S)
LOWEST = torch.finfo(torch.float32).min
BEFORE = [remove_noops.PASS, fold_constants.PASS]
PASSES = [*BEFORE, PASS, *reversed(BEFORE)]


def each(spellings: dict[str, Callable[..., torch.Tensor]], *inputs: torch.Tensor, **weights: object) -> Ran:
    """One attention a spelling; several programs in one, since capturing is what takes the time."""

    def forward(m, *x):
        return [spelling(m, *x) for spelling in spellings.values()]

    ran = run(PASSES, program(forward, **weights), *inputs)
    missed = [row.reason for row in ran.remarks.of_kind("missed")]
    assert not missed
    return ran.counts(attention=len(spellings), softmax=0)


def attentions(ran: Ran) -> list[fx.Node]:
    return [node for node in ran.graph.calls if node.target is ATTENTION.overload]


def options(node: fx.Node) -> dict[str, object]:
    return {"causal": node.args[4], "scale": node.args[5], **node.kwargs}


def attend(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) @ v


SCALES = {
    "none": lambda m, q, k, v: attend(q @ k.mT, v),
    "of the scores": lambda m, q, k, v: attend(q @ k.mT / math.sqrt(D), v),
    "multiplied": lambda m, q, k, v: attend(D**-0.5 * (q @ k.mT), v),
    "of queries": lambda m, q, k, v: attend((q * D**-0.5) @ k.mT, v),
    "of keys": lambda m, q, k, v: attend(q @ (k / math.sqrt(D)).mT, v),
    "of transposed keys": lambda m, q, k, v: attend(q @ (k.mT / math.sqrt(D)), v),
    "of both": lambda m, q, k, v: attend((q * D**-0.25) @ (k / math.sqrt(math.sqrt(D))).mT, v),
    "a tensor": lambda m, q, k, v: attend(q @ k.mT / torch.sqrt(torch.tensor(float(D))), v),
    "twice": lambda m, q, k, v: attend(q @ k.mT / 2 * 0.3, v),
}


def test_scales() -> None:
    ran = each(SCALES, Q, K, V)
    found = [node.args[5] for node in attentions(ran)]
    assert found == pytest.approx([1.0] + [D**-0.5] * 7 + [0.15]) or found
    ran.counts(mul=0, div=0)


PRODUCTS = {
    "matmul": lambda m, q, k, v: torch.matmul(torch.matmul(q, k.transpose(-1, -2)).softmax(-1), v),
    "permuted": lambda m, q, k, v: attend(q @ k.permute(0, 1, 3, 2), v),
    "einsum": lambda m, q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v
    ),
    "einsum, keys first": lambda m, q, k, v: torch.einsum(
        "bhkd, bhqk -> bqhd", v, torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(dim=3)
    ),
    "einsum, tokens first": lambda m, q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1),
        v.transpose(1, 2),
    ),
    "einsum, heads last": lambda m, q, k, v: torch.einsum(
        "bqkh,bhkd->bqhd", torch.einsum("bhqd,bhkd->bqkh", q, k).softmax(2), v
    ),
    "bmm": lambda m, q, k, v: torch.bmm(
        F.softmax(torch.bmm(q.reshape(B * H, S, D), k.reshape(B * H, S, D).transpose(1, 2)), dim=-1),
        v.reshape(B * H, S, D),
    ).view(B, H, S, D),
    "bmm, joined result": lambda m, q, k, v: torch.bmm(
        F.softmax(torch.bmm(q.reshape(B * H, S, D), k.reshape(B * H, S, D).transpose(1, 2)), dim=-1),
        v.reshape(B * H, S, D),
    ),
    "bmm, softmax apart": lambda m, q, k, v: (
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, S, S).softmax(-1).view(B * H, S, S)
        @ v.flatten(0, 1)
    ),
    "baddbmm": lambda m, q, k, v: torch.bmm(
        torch.baddbmm(m.bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=0.3).softmax(-1),
        v.flatten(0, 1),
    ),
    "transposed": lambda m, q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT,
    "keys times queries": lambda m, q, k, v: (k @ q.mT).mT.softmax(-1) @ v,
    "softmax of columns": lambda m, q, k, v: (k @ q.mT).softmax(-2).mT @ v,
    "one head": lambda m, q, k, v: attend(q[:, 0] @ k[:, 0].mT, v[:, 0]),
    "one head, one sequence": lambda m, q, k, v: attend(q[0, 0] @ k[0, 0].mT, v[0, 0]),
    "five dimensions": lambda m, q, k, v: attend(q[:, None] @ k[:, None].mT, v[:, None]),
    "queries for every batch": lambda m, q, k, v: attend(q[0, 0] @ k.mT, v),
    "cross attention, wider values": lambda m, q, k, v: attend(
        q @ k[:, :, :3].mT, torch.cat([v, v], -1)[:, :, :3]
    ),
    "cached": lambda m, q, k, v: attend(q @ torch.cat([k, k], 2).mT, torch.cat([v, v], 2)),
}


def test_products() -> None:
    each(PRODUCTS, Q, K, V, bias=randn(B * H, 1, S))


HEADS = {
    "as transformers does": lambda m, q, k, v: attend(q @ repeat_kv(k, 2).transpose(2, 3), repeat_kv(v, 2)),
    "interleaved": lambda m, q, k, v: attend(
        q @ k.repeat_interleave(2, dim=1).mT, v.repeat_interleave(2, dim=1)
    ),
    "five dimensions": lambda m, q, k, v: attend(
        q.view(B, 2, 2, S, D) @ k.unsqueeze(2).mT, v.unsqueeze(2)
    ).flatten(1, 2),
    "expanded": lambda m, q, k, v: attend(
        q.view(B, 2, 2, S, D) @ k[:, :, None].expand(-1, -1, 2, -1, -1).mT,
        v[:, :, None].expand(-1, -1, 2, -1, -1),
    ).reshape(B, H, S, D),
    "einsum": lambda m, q, k, v: torch.einsum(
        "bkgst,bktd->bkgsd", torch.einsum("bkgsd,bktd->bkgst", q.view(B, 2, 2, S, D), k).softmax(-1), v
    ),
    "einsum, tokens first": lambda m, q, k, v: torch.einsum(
        "bkgst,btkd->bskgd",
        torch.einsum(
            "bskgd,btkd->bkgst", q.transpose(1, 2).reshape(B, S, 2, 2, D), k.transpose(1, 2)
        ).softmax(-1),
        v.transpose(1, 2),
    ),
    "one key for all": lambda m, q, k, v: attend(q @ k[:, :1].mT, v[:, :1]),
    "one key for all, einsum": lambda m, q, k, v: torch.einsum(
        "bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1), v[:, 0]
    ),
}


def test_grouped_heads() -> None:
    ran = each(HEADS, Q, K2, V2)
    assert [node.args[1].meta["val"].shape[2] for node in attentions(ran)] == [2] * 6 + [1] * 2


PACKED = {
    "chunks": lambda m, x: [y.reshape(B, S, H, D).transpose(1, 2) for y in m.qkv(x).chunk(3, dim=-1)],
    "timm": lambda m, x: m.qkv(x).reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0),
    "indexed": lambda m, x: [m.qkv(x).reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4)[i] for i in range(3)],
}


def test_packed_projections() -> None:
    def spelled(split):
        def attention(m, x):
            q, k, v = split(m, x)
            return attend(q @ k.mT * D**-0.5, v).transpose(1, 2).reshape(B, S, H * D)

        return attention

    spellings = {name: spelled(split) for name, split in PACKED.items()}
    ran = each(spellings, randn(B, S, H * D), qkv=nn.Linear(H * D, 3 * H * D))
    ran.counts(permute=0, unbind=0)


CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
MASKS = {
    "masked_fill with -inf": lambda m, s, pad: s.masked_fill(~pad, -math.inf),
    "masked_fill with -1e4": lambda m, s, pad: s.masked_fill(pad == 0, -1e4),
    "masked_fill with -1e9": lambda m, s, pad: s.masked_fill(pad.logical_not(), -1e9),
    "masked_fill with the lowest": lambda m, s, pad: s.masked_fill(~pad, LOWEST),
    "where with -inf": lambda m, s, pad: torch.where(pad, s, -math.inf),
    "where not": lambda m, s, pad: torch.where(~pad, torch.tensor(-1e9), s),
    "where, a tensor": lambda m, s, pad: torch.where(pad, s, torch.full([], LOWEST)),
    "a sliced buffer": lambda m, s, pad: s.masked_fill(m.tril[:, :, :S, :S] == 0, -math.inf),
    "causal, then padding": lambda m, s, pad: s.masked_fill(~CAUSAL, -1e9).masked_fill(~pad, -1e9),
    "causal, then padding, two numbers": lambda m, s, pad: torch.where(CAUSAL, s, LOWEST).masked_fill(
        ~pad, -math.inf
    ),
    "lowest, then -1e9": lambda m, s, pad: torch.where(CAUSAL, s, LOWEST).masked_fill(~pad, -1e9),
    "added": lambda m, s, pad: s + (1.0 - pad.float()) * -1e4,
    "added lowest": lambda m, s, pad: s + (1.0 - pad.float()) * LOWEST,
    "added -inf": lambda m, s, pad: s + torch.zeros(S, S).masked_fill(~CAUSAL, -math.inf),
    "added -inf where it is": lambda m, s, pad: s + torch.zeros(B, 1, 1, S).masked_fill(~pad, -math.inf),
    "subtracted": lambda m, s, pad: s - 1e9 * (1.0 - pad.float()),
    "added in front": lambda m, s, pad: m.bias + s,
    "a bias and a mask": lambda m, s, pad: (s + m.bias).masked_fill(~pad, LOWEST),
    "a bias and -1e9": lambda m, s, pad: (s + m.bias).masked_fill(~pad, -1e9),
    "a mask and a bias": lambda m, s, pad: s.masked_fill(~pad, -math.inf) + m.bias,
    "causal lowest, added lowest": lambda m, s, pad: (
        torch.where(CAUSAL, s, LOWEST) + (1.0 - pad.float()) * LOWEST
    ),
    "scaled behind the mask": lambda m, s, pad: s.masked_fill(~pad, -1e9) * 0.5,
    "a bias, scaled": lambda m, s, pad: (s + m.bias) / 2,
    "cap": lambda m, s, pad: torch.tanh(s / 30.0) * 30.0,
    "cap and mask": lambda m, s, pad: (5 * torch.tanh(s * 0.2)).masked_fill(~pad, -math.inf),
}


def test_masks() -> None:
    def spelled(mask):
        return lambda m, q, k, v, pad: attend(mask(m, q @ k.mT / math.sqrt(D), pad[:, None, None] > 0), v)

    spellings = {name: spelled(mask) for name, mask in MASKS.items()}
    tril = torch.ones(1, 1, 9, 9, dtype=torch.long).tril()
    each(spellings, Q, K, V, PADDING, tril=tril, bias=randn(1, H, S, S))


def test_masks_of_joined_heads() -> None:
    def spelled(mask):
        def attention(m, q, k, v, pad):
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            pad = (pad[:, None, None] > 0).expand(B, H, 1, S).reshape(B * H, 1, S)
            return attend(mask(m, q @ k.mT / math.sqrt(D), pad), v).view(B, H, S, D)

        return attention

    wanted = "masked_fill with -inf", "where not", "causal, then padding", "a mask and a bias"
    spellings = {name: spelled(MASKS[name]) for name in wanted}
    each(spellings, Q, K, V, PADDING, bias=randn(B * H, S, S))


def test_half_precision() -> None:
    spellings = {
        "softmax in float32": lambda m, q, k, v: (
            (q @ k.mT / math.sqrt(D)).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        ),
        "scores in float32": lambda m, q, k, v: (
            (q @ k.mT).float().masked_fill(~CAUSAL, LOWEST).softmax(-1).to(q.dtype) @ v
        ),
    }
    each(spellings, *(x.bfloat16() for x in (Q, K, V)))
