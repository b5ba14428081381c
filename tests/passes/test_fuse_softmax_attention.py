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
    "a tensor a head": lambda m, q, k, v: attend(q @ k.mT * m.temperature / m.temperature.exp(), v),
    "twice": lambda m, q, k, v: attend(q @ k.mT / 2 * 0.3, v),
}


def test_scales() -> None:
    ran = each(SCALES, Q, K, V, temperature=randn(H, 1, 1))
    found = [node.args[5] or D**-0.5 for node in attentions(ran)]
    assert found == pytest.approx([1.0] + [D**-0.5] * 7 + [1.0, 0.15])
    ran.counts(mul=1, div=1)


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
    "bmm, scaled before heads are joined": lambda m, q, k, v: torch.bmm(
        F.softmax(
            torch.bmm((q * 0.5).reshape(B * H, S, D), k.reshape(B * H, S, D).transpose(1, 2)).tanh() * 5, -1
        ),
        v.reshape(B * H, S, D),
    ).view(B, H, S, D),
    "bmm, scaled at each of two views": lambda m, q, k, v: torch.bmm(
        F.softmax(
            torch.bmm(((q.reshape(-1, D) * 0.5).view(B, H, S, D) * 3).view(B * H, S, D), k.flatten(0, 1).mT),
            -1,
        ),
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
    "no projections": lambda m, q, k, v: attend(q @ q.mT, q),
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


def test_what_becomes_of_the_graph() -> None:
    def forward(m, q, k, v, pad):
        scores = (q @ k.transpose(-2, -1)) * 0.5
        scores = scores.masked_fill(pad[:, None, None] == 0, -1e9)
        return torch.softmax(scores, dim=-1) @ v

    run(PASS, program(forward), Q, K, V, PADDING).becomes(
        before="""
            %0 = transpose(k, -2, -1)
            %1 = matmul(q, %0)
            %2 = mul(%1, 0.5)
            %3 = unsqueeze(pad, 1)
            %4 = unsqueeze(%3, 2)
            %5 = eq(%4, 0)
            %6 = masked_fill(%2, %5, -1e+09)
            %7 = softmax(%6, -1)
            %8 = matmul(%7, v)
            return %8
        """,
        expected="""
            %0 = transpose(q, 1, 2)
            %1 = transpose(k, 1, 2)
            %2 = transpose(v, 1, 2)
            %3 = unsqueeze(pad, 1)
            %4 = unsqueeze(%3, 2)
            %5 = eq(%4, 0)
            %6 = logical_not(%5)
            %7 = graphopt.attention(%0, %1, %2, %6, False, 0.5, fill=-1e+09)
            %8 = transpose(%7, 1, 2)
            return %8
        """,
    )


def test_projections_of_one_input_with_joined_heads() -> None:
    """As BART did: the queries are scaled, and batch and heads are one dimension at both products."""

    def forward(m, x):
        q, k, v = (
            y.view(B, S, H, D).transpose(1, 2).reshape(B * H, S, D)
            for y in (m.q(x) * D**-0.5, m.k(x), m.v(x))
        )
        out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return out.view(B, H, S, D).transpose(1, 2).reshape(B, S, H * D)

    weights = {name: nn.Linear(H * D, H * D) for name in "qkv"}
    run(PASSES, program(forward, **weights), randn(B, S, H * D)).becomes("""
        %0 = linear(x, q.weight, q.bias)
        %1 = reshape(%0, [2, 5, 4, 8])
        %2 = linear(x, k.weight, k.bias)
        %3 = linear(x, v.weight, v.bias)
        %4 = reshape(%2, [2, 5, 4, 8])
        %5 = reshape(%3, [2, 5, 4, 8])
        %6 = graphopt.attention(%1, %4, %5, None, False, None)
        %7 = reshape(%6, [2, 5, 32])
        return %7
    """)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_layer_of_torch(batch_first: bool) -> None:
    def forward(m, x, pad):
        return m.layer(x, x, x, key_padding_mask=pad)[0]

    model = program(forward, layer=nn.MultiheadAttention(16, 4, batch_first=batch_first))
    x, pad = randn(B, S, 16), PADDING == 0
    run(PASSES, model, x if batch_first else x.transpose(0, 1).contiguous(), pad).counts(
        attention=1, softmax=0
    )


def test_shifted_windows() -> None:
    """As Swin has them: a bias a head, and a mask a window."""

    def forward(m, q, k, v):
        scores = q @ k.mT * D**-0.5 + m.bias
        scores = (scores.view(1, B, H, S, S) + m.window[None, :, None]).view(B, H, S, S)
        return scores.softmax(-1) @ v

    window = (torch.rand(B, S, S) > 0.8).float() * -100.0
    ran = run(PASSES, program(forward, bias=randn(1, H, S, S), window=window), Q, K, V)
    assert ran.counts(attention=1)


REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "read by the caller": (
        lambda m, q, k, v: (p := (q @ k.mT).softmax(-1), p @ v),
        "the probabilities are also read by the caller",
    ),
    "read by another op": (
        lambda m, q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p.mean(1)),
        r"the probabilities are also read by aten.mean \(mean\)",
    ),
    "two products": (
        lambda m, q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p @ k),
        "the probabilities are also read by two products",
    ),
    "changed": (
        lambda m, q, k, v: (q @ k.mT).softmax(-1).reshape(B, H * S, S).reshape(B, H, S, S) @ v,
        "reshapes",
    ),
    "scores read too": (
        lambda m, q, k, v: ((s := q @ k.mT).softmax(-1) @ v, s.amax(-1)),
        "matmul is also read by amax",
    ),
    "along the queries": (
        lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v,
        "the softmax does not run along the axis that aten.matmul",
    ),
    "along the heads": (
        lambda m, q, k, v: (q @ k.mT).softmax(1) @ v,
        "the softmax does not run along the keys of aten.matmul",
    ),
    "another function": (
        lambda m, q, k, v: torch.relu(q @ k.mT).softmax(-1) @ v,
        r"aten.relu \(relu\) is no product of queries and keys",
    ),
    "a negative scale": (
        lambda m, q, k, v: (q @ k.mT * -1.0).softmax(-1) @ v,
        "-1.0, which is not above zero",
    ),
    "squared": (lambda m, q, k, v: ((s := q @ k.mT) * s).softmax(-1) @ v, "squares the scores"),
    "scaled by key": (
        lambda m, q, k, v: (q @ k.mT * k[:, :, None, :, 0]).softmax(-1) @ v,
        "differs between keys",
    ),
    "scaled by a tensor behind a mask": (
        lambda m, q, k, v: ((q @ k.mT).masked_fill(~CAUSAL, -1e9) * q[..., :1]).softmax(-1) @ v,
        "masked or capped already by a tensor",
    ),
    "a number added": (lambda m, q, k, v: (q @ k.mT + 1.5).softmax(-1) @ v, "adds 1.5 to the scores"),
    "subtracted from": (lambda m, q, k, v: (v @ v.mT - q @ k.mT).relu().softmax(-1) @ v, "relu"),
    "replaced by another tensor": (
        lambda m, q, k, v: torch.where(CAUSAL, q @ k.mT, v @ v.mT).softmax(-1) @ v,
        "replaces scores by values that are not one number",
    ),
    "capped twice": (
        lambda m, q, k, v: torch.tanh(torch.tanh(q @ k.mT)).softmax(-1) @ v,
        "caps scores that are masked or capped already",
    ),
    "filled, then biased": (
        lambda m, q, k, v: ((q @ k.mT).masked_fill(~CAUSAL, -1e4) + q[..., :1]).softmax(-1) @ v,
        "scores filled with -10000 are masked or biased again",
    ),
    "filled with two numbers": (
        lambda m, q, k, v: (
            (q @ k.mT).masked_fill(~CAUSAL, -math.inf).masked_fill(CAUSAL.mT, -1e4).softmax(-1) @ v
        ),
        "scores that may be -inf already are filled with -10000",
    ),
    "values a query": (
        lambda m, q, k, v: torch.einsum(
            "bhqk,bhqkd->bhqd", (q @ k.mT).softmax(-1), v[:, :, None] * q[:, :, :, None]
        ),
        "no axis of features alone",
    ),
    "added to something": (
        lambda m, q, k, v: torch.baddbmm(q[0], (q[0] @ k[0].mT).softmax(-1), v[0]),
        "adds to what is attended to",
    ),
    "other types": (
        lambda m, q, k, v: (q.double() @ k.double().mT).softmax(-1).float() @ v,
        "the query is torch.float64, but the result torch.float32",
    ),
    "tokens reshaped": (
        lambda m, q, k, v: (q @ k.mT).reshape(B, H, 1, S * S).softmax(-1) @ v.repeat(1, 1, S, 1),
        "moves the axis|reshapes more than the batch and the heads",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    attention, reason = REFUSED[name]
    run(PASS, program(attention), Q, K, V).refuses(reason)


def test_no_word_about_what_nobody_would_call_attention() -> None:
    def forward(m, x, q, k, v):
        return x.softmax(-1), (q @ k.mT).softmax(-1), torch.sigmoid(q @ k.mT) @ v

    ran = run(PASS, program(forward), randn(3, 7), Q, K, V).stays()
    assert not ran.remarks.of_kind("missed")


DYNAMIC = {name: {0: "batch", 2: "seq"} for name in "qkv"}


def test_dynamic_sizes() -> None:
    def forward(m, q, k, v):
        seq = q.shape[2]
        causal = m.tril[:, :, :seq, :seq] == 0
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(causal, -math.inf)
        joined = torch.bmm((0.3 * q).flatten(0, 1), k.flatten(0, 1).mT).softmax(-1) @ v.flatten(0, 1)
        grouped = q.view(-1, 2, 2, seq, D) @ k[:, :2, None].mT
        return scores.softmax(-1) @ v, joined.view(-1, H, seq, D), grouped.softmax(-1) @ v[:, :2, None]

    tril = torch.ones(1, 1, 9, 9, dtype=torch.long).tril()
    ran = run(PASSES, program(forward, tril=tril), Q, K, V, dynamic=DYNAMIC).counts(attention=3, softmax=0)
    for batch, seq in ((3, 2), (1, 9)):
        ran.agrees(*(randn(batch, H, seq, D, seed=i) for i in range(3)))


def test_heads_of_any_number_are_refused() -> None:
    def forward(m, q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    run(PASS, program(forward), Q, K, V, dynamic={n: {1: "heads"} for n in "qkv"}).refuses(
        "the number of heads is dynamic"
    )


def test_queries_that_any_number_of_sequences_share_are_refused() -> None:
    def forward(m, q, k, v):
        return (q[:1] @ k.mT).softmax(-1) @ v

    ran = run(PASS, program(forward), Q, K, V, dynamic={n: {0: "batch"} for n in "kv"})
    ran.refuses("the query is repeated along a dynamic dimension")


def test_scaled_keys_of_repeated_heads_joined_with_a_dynamic_batch() -> None:
    def forward(m, q, k, v):
        key = repeat_kv(k[:, :1], H) / 1.4
        value = v[:, :1].expand(-1, H, -1, -1)
        q, k, v = (x.reshape(-1, q.shape[2], D) for x in (0.7 * q, key, value))
        return (torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v).view(-1, H, q.shape[1], D)

    ran = run(PASSES, program(forward), Q, K, V, dynamic=DYNAMIC).counts(attention=1, softmax=0)
    ran.agrees(*(randn(3, H, 4, D, seed=i) for i in range(3)))
