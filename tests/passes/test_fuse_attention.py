from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers.models.llama.modeling_llama import repeat_kv

from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes.fuse_attention import PASS
from graphopt.passes.remove_noops import PASS as REMOVE_NOOPS
from tests._models import randn
from tests.passes._harness import Ran, program, run

# (batch, heads, tokens, features) with 4 heads, or 2 for keys and values
Q, K, V = randn(2, 4, 5, 8), randn(2, 4, 5, 8, seed=1), randn(2, 4, 5, 8, seed=2)
K2, V2 = K[:, :2].clone(), V[:, :2].clone()


def attend(*inputs: torch.Tensor, **options: object) -> Ran:
    def forward(m, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    return run(PASS, program(forward), *inputs)


def attentions(ran: Ran) -> list[fx.Node]:
    return [node for node in ran.graph.calls if node.target is ATTENTION.overload]


def test_heads_first_is_transposed_around_the_op() -> None:
    attend(Q, K, V).becomes("""
        %0 = transpose(q, 1, 2)
        %1 = transpose(k, 1, 2)
        %2 = transpose(v, 1, 2)
        %3 = graphopt.attention(%0, %1, %2, None, False, None)
        %4 = transpose(%3, 1, 2)
        return %4
    """)


def test_transposes_that_are_there_cancel() -> None:
    def forward(m, q, k, v):
        q, k, v = q.transpose(1, 2), k.transpose(-2, -3), v.transpose(2, 1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 32)

    inputs = (x.transpose(1, 2).contiguous() for x in (Q, K, V))
    run([PASS, REMOVE_NOOPS], program(forward), *inputs).becomes("""
        %0 = graphopt.attention(q, k, v, None, False, None)
        %1 = reshape(%0, [2, 5, 32])
        return %1
    """)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 2}])
def test_options(options: dict[str, object]) -> None:
    causal, scale = options.get("is_causal", False), options.get("scale")
    ran = attend(Q, K, V, **options)
    (op,) = attentions(ran)
    assert op.args[4:] == (causal, scale)


def test_masks() -> None:
    def forward(m, q, k, v, full):
        added = full[0, 0], full[:, :1, :1], full[:1], full
        masks = *added, *(mask > -0.5 for mask in added)
        return [F.scaled_dot_product_attention(q, k, v, mask) for mask in masks]

    ran = run(PASS, program(forward), Q, K, V, randn(2, 4, 5, 5))
    ran.counts(attention=8, scaled_dot_product_attention=0)


def test_cross_attention_with_wider_values() -> None:
    attend(Q, randn(2, 4, 7, 8, seed=1), randn(2, 4, 7, 12, seed=2)).counts(attention=1)


def test_heads_that_torch_repeats() -> None:
    attend(Q, K2, V2, enable_gqa=True).counts(attention=1, transpose=4)


REPEATED = {
    "as transformers does": lambda x: repeat_kv(x, 2),
    "interleaved": lambda x: x.repeat_interleave(2, dim=1),
    "interleaved, counted from behind": lambda x: x.repeat_interleave(2, dim=-3),
}
REPEATED_OTHERWISE = {
    "one after the other": lambda x: x.repeat(1, 2, 1, 1),
    "expanded before the heads": lambda x: x[:, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8),
    "concatenated": lambda x: torch.cat([x, x], dim=1),
    "halves of tokens": lambda x: x.reshape(2, 4, 5, 4).repeat_interleave(2, dim=3),
    "another dimension": lambda x: x.reshape(1, 4, 5, 8).repeat_interleave(2, dim=0),
}


def test_repeated_heads_are_not_repeated_any_more() -> None:
    def forward(m, q, k, v):
        return [F.scaled_dot_product_attention(q, repeat(k), repeat(v)) for repeat in REPEATED.values()]

    ran = run(PASS, program(forward), Q, K2, V2).counts(attention=3)
    assert {op.args[1].meta["val"].shape for op in attentions(ran)} == {(2, 5, 2, 8)}


def test_heads_that_are_repeated_in_another_order_stay_so() -> None:
    def forward(m, q, k, v):
        repeats = REPEATED_OTHERWISE.values()
        return [F.scaled_dot_product_attention(q, repeat(k), repeat(v)) for repeat in repeats]

    ran = run(PASS, program(forward), Q, K2, V2).counts(attention=5)
    assert {op.args[1].meta["val"].shape for op in attentions(ran)} == {(2, 5, 4, 8)}


def test_keys_alone_repeated() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), v)

    run(PASS, program(forward), Q, K2, V).counts(attention=1, expand=1, transpose=4)


def test_repeated_keys_that_others_read_too() -> None:
    def forward(m, q, k, v):
        k, v = repeat_kv(k, 2), repeat_kv(v, 2)
        return F.scaled_dot_product_attention(q, k, v), k

    run(PASS, program(forward), Q, K2, V2).counts(attention=1, expand=1)


def test_one_key_head_for_all() -> None:
    attend(Q, K[:, :1].clone(), V[:, :1].clone()).counts(attention=1)


def test_dropout_is_refused() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9).sum() * 0

    run(PASS, program(forward), Q, K, V).refuses("it drops out with probability 1e-09")


def test_batches_that_are_broadcast_are_refused() -> None:
    attend(Q, K[:1].clone(), V[:1].clone()).refuses("query, key and value differ in batch size")


def test_key_and_value_heads_that_differ_are_refused() -> None:
    attend(Q, K2, V[:, :1].clone(), enable_gqa=True).refuses("key and value differ in the number of heads")


def test_one_query_head_for_all_keys_is_refused() -> None:
    attend(Q[:, :1].clone(), K, V).refuses("4 key heads do not divide 1 query heads")


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_above_zero_is_refused(scale: float) -> None:
    attend(Q, K, V, scale=scale).refuses(f"its scale is {scale}, not above zero")


def test_a_mask_of_another_type_is_refused() -> None:
    inputs = (x.bfloat16() for x in (Q, K, V))
    attend(*inputs, randn(5, 5)).refuses("the mask is torch.float32, not torch.bfloat16")


def test_without_heads_it_stays() -> None:
    attend(Q[:, 0].clone(), K[:, 0].clone(), V[:, 0].clone()).stays()


def test_the_layer_of_torch() -> None:
    def forward(m, x):
        return m.layer(x)

    model = program(forward, layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    run([PASS, REMOVE_NOOPS], model, randn(2, 5, 8)).counts(attention=1, scaled_dot_product_attention=0)


def test_dynamic_sizes() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True)

    names = {name: {0: "batch", 2: "seq"} for name in "qkv"}
    ran = run([REMOVE_NOOPS, PASS], program(forward), Q, K2, V2, dynamic=names)
    ran.counts(attention=1, expand=0)
    for batch, seq in ((3, 2), (1, 9)):
        ran.agrees(randn(batch, 4, seq, 8), randn(batch, 2, seq, 8, seed=1), randn(batch, 2, seq, 8, seed=2))


def test_dynamic_batches_that_may_differ_are_refused() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    ran = run(PASS, program(forward), Q, K[:1].clone(), V[:1].clone(), dynamic={"q": {0: "batch"}})
    ran.refuses("differ in batch size").agrees(randn(3, 4, 5, 8), K[:1], V[:1])
