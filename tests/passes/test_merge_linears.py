from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes import fuse_attention, remove_noops
from graphopt.passes.default import pipeline
from graphopt.passes.merge_linears import PASS
from tests._models import randn
from tests.passes._harness import Ran, program, run

X = randn(2, 5, 8)
PASSES = [fuse_attention.PASS, remove_noops.PASS, PASS]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*x.shape[:2], -1, 4).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    grouped = q.shape[-1] != k.shape[-1]
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), enable_gqa=grouped)


def self_attention(m, x):
    return attend(m.q(x), m.k(x), m.v(x))


def layers(kv: int = 8, **given: nn.Module) -> dict[str, nn.Module]:
    return {"q": nn.Linear(8, 8), "k": nn.Linear(8, kv), "v": nn.Linear(8, kv), **given}


def merged(ran: Ran) -> list[int]:
    """The rows of every projection that is left."""
    return [node.meta["val"].shape[-1] for node in ran.graph.calls if "linear" in str(node.target)]


def test_three_projections_of_one_value() -> None:
    ran = run(PASSES, program(self_attention, **layers()), X)
    ran.becomes("""
        %0 = linear(x, <stacked: q.weight, k.weight, v.weight>, <stacked: q.bias, k.bias, v.bias>)
        %1 = split_with_sizes(%0, [8, 8, 8], -1)
        %2 = getitem(%1, 0)
        %3 = getitem(%1, 1)
        %4 = getitem(%1, 2)
        %5 = reshape(%2, [2, 5, 2, 4])
        %6 = reshape(%3, [2, 5, 2, 4])
        %7 = reshape(%4, [2, 5, 2, 4])
        %8 = graphopt.attention(%5, %6, %7, None, False, None)
        %9 = transpose(%8, 1, 2)
        return %9
    """)


def test_fewer_heads_for_keys_and_values() -> None:
    assert merged(run(PASSES, program(self_attention, **layers(kv=4)), X)) == [16]


def test_without_biases() -> None:
    given = {name: nn.Linear(8, 8, bias=False) for name in "qkv"}
    assert merged(run(PASSES, program(self_attention, **given), X)) == [24]


def test_a_key_without_bias_gets_zeros() -> None:
    """As in Whisper."""
    given = layers(k=nn.Linear(8, 8, bias=False))
    ran = run(PASSES, program(self_attention, **given), X)
    assert merged(ran) == [24]
    (how,) = {constant.how for constant in ran.graph.constants.values() if "zeros" in constant.how}
    assert how == "stacked, with zeros where there is none"


def test_cross_attention() -> None:
    def forward(m, x, y):
        return attend(m.q(x), m.k(y), m.v(y))

    assert sorted(merged(run(PASSES, program(forward, **layers()), X, randn(2, 7, 8)))) == [8, 16]


def test_projections_that_others_read_too() -> None:
    def forward(m, x):
        k, v = m.k(x), m.v(x)
        return attend(m.q(x), k, v), k, v.sin()

    assert merged(run(PASSES, program(forward, **layers()), X)) == [24]


def test_a_projection_that_is_read_before_the_others_are_made() -> None:
    def forward(m, x):
        v = m.v(x)
        scale = v.sin().mean()
        return attend(m.q(x), m.k(x), v) * scale

    assert merged(run(PASSES, program(forward, **layers()), X)) == [24]


def test_projections_that_depend_on_each_other_stay() -> None:
    def forward(m, x):
        q = m.q(x)
        k = m.k(q)
        return attend(q, k, m.v(k))

    run(PASSES, program(forward, **layers()), X).stays()


def test_one_projection_for_all_stays() -> None:
    def forward(m, x):
        q = m.q(x)
        return attend(q, q, q)

    run(PASSES, program(forward, **layers()), X).stays()


def test_tied_weights() -> None:
    shared = nn.Linear(8, 8)
    ran = run(PASSES, program(self_attention, **layers(q=shared, k=shared)), X)
    assert merged(ran) == [24]


def test_a_projection_behind_something_else_stays_apart() -> None:
    def forward(m, x):
        return attend(m.q(x).tanh(), m.k(x), m.v(x))

    assert sorted(merged(run(PASSES, program(forward, **layers()), X))) == [8, 16]


def test_two_layers() -> None:
    def forward(m, x):
        once = attend(m.q(x), m.k(x), m.v(x)).transpose(1, 2).reshape(2, 5, 8)
        return attend(m.q(once), m.k(once), m.v(once))

    assert merged(run(PASSES, program(forward, **layers()), X)) == [24, 24]


def test_a_weight_that_is_an_input_is_refused() -> None:
    def forward(m, x, w):
        return attend(F.linear(x, w), F.linear(x, m.k), F.linear(x, m.v))

    ran = run(PASSES, program(forward, k=randn(8, 8), v=randn(8, 8)), X, randn(8, 8))
    ran.refuses("a weight is not a constant")


def test_a_bias_that_is_an_input_is_refused() -> None:
    def forward(m, x, b):
        return attend(F.linear(x, m.w, b), F.linear(x, m.w, m.b), F.linear(x, m.w, m.b))

    run(PASSES, program(forward, w=randn(8, 8), b=randn(8)), X, randn(8)).refuses("a bias is not a constant")


def test_very_many_rows_are_refused() -> None:
    given = {name: nn.Linear(8, 2732, bias=False) for name in "qkv"}
    run(PASSES, program(self_attention, **given), X).refuses("the merged product would have 8196 rows")


def test_heads_on_one_value() -> None:
    def forward(m, x):
        pooled = x.mean(1)
        return m.q(pooled), m.k(pooled), m.v(pooled).softmax(-1)

    given = {"q": nn.Linear(8, 2), "k": nn.Linear(8, 5), "v": nn.Linear(8, 3)}
    run(PASS, program(forward, **given), X).becomes("""
        %0 = mean(x, [1])
        %1 = linear(%0, <stacked: q.weight, k.weight, v.weight>, <stacked: q.bias, k.bias, v.bias>)
        %2 = split_with_sizes(%1, [2, 5, 3], -1)
        %3 = getitem(%2, 0)
        %4 = getitem(%2, 1)
        %5 = getitem(%2, 2)
        %6 = softmax(%5, -1)
        return %3, %4, %6
    """)


def test_heads_with_an_activation_keep_it() -> None:
    def forward(m, x):
        return m.q(x).relu(), m.k(x), m.v(x)

    assert sorted(merged(run(PASS, program(forward, **layers()), X))) == [8, 16]


class Heads(nn.Module):
    """Classifiers of one pooled vector, one of them with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(8, size) for name, size in (("a", 3), ("b", 4), ("c", 2))}
        )
        self.deep = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.norm(x).mean(1)
        found = {name: head(pooled) for name, head in self.heads.items()}
        return {**found, "d": self.deep(pooled).softmax(-1)}


def test_classifiers_of_one_pooled_vector() -> None:
    ran = run(pipeline(), Heads(), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(linear=2, linear_activation=1, split_with_sizes=1).agrees(randn(3, 2, 8))
    assert 9 in merged(ran)


class SharedExpert(nn.Module):
    """A mixture's shared expert, its own gate, and the scores of the routed ones."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"gate": 12, "up": 12, "router": 4, "own": 1}
        self.read = nn.ModuleDict({name: nn.Linear(8, size, bias=False) for name, size in sizes.items()})
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expert = self.down(F.silu(self.read["gate"](x)) * self.read["up"](x))
        return torch.sigmoid(self.read["own"](x)) * expert, self.read["router"](x).softmax(-1)


def test_a_shared_expert_keeps_its_gated_block() -> None:
    ran = run(pipeline(), SharedExpert(), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(gated_mlp=1, silu=0).agrees(randn(3, 2, 8))


def test_keys_and_values_of_two_attentions_stay_apart() -> None:
    def forward(m, x, y):
        once = attend(m.q(x), m.k(y), m.v(y))
        return attend(heads(x).transpose(1, 2).reshape(x.shape), m.k2(y), m.v2(y)) + once

    given = layers(k2=nn.Linear(8, 8), v2=nn.Linear(8, 8))
    assert sorted(merged(run(PASSES, program(forward, **given), X, randn(2, 7, 8)))) == [8, 16, 16]


def test_a_large_weight_that_others_read_is_refused() -> None:
    def forward(m, x):
        return m.q(x), m.k(x), m.q.weight.sum()

    given = {"q": nn.Linear(2048, 140, bias=False), "k": nn.Linear(2048, 2, bias=False)}
    ran = run(PASS, program(forward, **given), randn(2, 2048))
    ran.refuses("sum_1 reads q.weight too: a copy of 1146880 bytes would be kept")


def test_half_precision() -> None:
    given = {name: nn.Linear(8, 8).bfloat16() for name in "qkv"}
    assert merged(run(PASSES, program(self_attention, **given), X.bfloat16())) == [24]


def test_dynamic_sizes() -> None:
    ran = run(PASSES, program(self_attention, **layers()), X, dynamic={"x": {0: "batch", 1: "seq"}})
    assert merged(ran) == [24]
    ran.agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))
