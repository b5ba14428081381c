from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes import fold_constants, fuse_linear, merge_permutes, remove_noops
from graphopt.passes.prune_zero_heads import PASS
from tests import _models as models
from tests._models import Example, padding, randn, randomised, tokens
from tests.passes._harness import Ran, program, run

X = randn(2, 5, 16)
H, D = 4, 4  # heads, and features of each
BEFORE = [remove_noops.PASS, fold_constants.PASS, remove_noops.PASS, fuse_linear.PASS, merge_permutes.PASS]


def projections(kv_heads: int = H) -> dict[str, nn.Module]:
    return {
        "q": nn.Linear(16, H * D),
        "k": nn.Linear(16, kv_heads * D),
        "v": nn.Linear(16, kv_heads * D),
        "o": nn.Linear(H * D, 16),
    }


def without(model: nn.Module, values: Iterable[int] = (), outputs: Iterable[int] = ()) -> nn.Module:
    """The model with random weights, the values of some heads zero, and what reads some others."""
    randomised(model)
    with torch.no_grad():
        for head in values:
            model.v.weight[head * D : head * D + D] = 0
            model.v.bias[head * D : head * D + D] = 0
        for head in outputs:
            model.o.weight[:, head * D : head * D + D] = 0
    return model


def widths(ran: Ran) -> list[int]:
    """The number of rows of every projection, and of columns of the last, in order."""
    found = [node for node in ran.graph.calls if node.target is torch.ops.aten.linear.default]
    shapes = [node.args[1].meta["val"].shape for node in found]
    return [*(shape[0] for shape in shapes[:-1]), shapes[-1][1]]


def split(x: torch.Tensor, heads: int = H) -> torch.Tensor:
    return x.view(*x.shape[:-1], heads, D).transpose(1, 2)


def merged(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def fused(m, x):
    attended = F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)), is_causal=True)
    return m.o(merged(attended))


def spelled(m, x):
    scores = split(m.q(x)) @ split(m.k(x)).transpose(-1, -2) / D**0.5
    return m.o(merged(scores.softmax(-1) @ split(m.v(x))))


def masked(m, x):
    scores = torch.matmul(split(m.q(x)), split(m.k(x)).mT) * D**-0.5 + torch.ones(5, 5).triu(1) * -1e4
    weights = F.dropout(torch.softmax(scores, dim=-1), 0.1, False)
    return m.o(torch.matmul(weights, split(m.v(x))).permute(0, 2, 1, 3).flatten(2))


def rotated(m, x):
    def turn(y):
        half = torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1)
        return y * m.cos + half * m.sin

    q, k = turn(split(m.q(x))), turn(split(m.k(x)))
    return m.o(merged(F.scaled_dot_product_attention(q, k, split(m.v(x)))))


def normed(m, x):
    q, k = F.rms_norm(split(m.q(x)), (D,), m.scale), F.layer_norm(split(m.k(x)), (D,), m.scale)
    return m.o(merged(F.scaled_dot_product_attention(q, k, split(m.v(x)))))


@pytest.mark.parametrize("attend", [fused, spelled, masked, rotated, normed])
def test_zero_values_and_unread_heads(attend) -> None:
    def forward(m, x):
        return attend(m, x)

    more = {"cos": randn(5, D), "sin": randn(5, D, seed=1), "scale": randn(D)}
    model = without(program(forward, **projections(), **more), values=[1], outputs=[3])
    assert widths(run(PASS, model, X, redraw=False)) == [8, 8, 8, 8]


def test_what_becomes_of_the_graph() -> None:
    def forward(m, x):
        return m.o(merged(F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)))))

    model = without(program(forward, **projections()), values=[0])
    run(PASS, model, X, redraw=False).becomes("""
        %0 = linear(x, <3 of 4 units: q.weight>, <3 of 4 units: q.bias>)
        %1 = reshape(%0, [2, 5, 3, 4])
        %2 = linear(x, <3 of 4 units: k.weight>, <3 of 4 units: k.bias>)
        %3 = reshape(%2, [2, 5, 3, 4])
        %4 = linear(x, <3 of 4 units: v.weight>, <3 of 4 units: v.bias>)
        %5 = reshape(%4, [2, 5, 3, 4])
        %6 = transpose(%5, 1, 2)
        %7 = transpose(%3, 1, 2)
        %8 = transpose(%1, 1, 2)
        %9 = scaled_dot_product_attention(%8, %7, %6)
        %10 = transpose(%9, 1, 2)
        %11 = reshape(%10, [2, 5, 12])
        %12 = linear(%11, <3 of 4 units: o.weight>, o.bias)
        return %12
    """)


def grouped(m, x):
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def repeated(m, x):
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, 1)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def expanded(m, x):
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(-1, 4, y.shape[2], D) for y in (k, v))
    return m.o(merged((q @ k.mT).softmax(-1) @ v))


@pytest.mark.parametrize("attend", [grouped, repeated, expanded])
def test_heads_that_share_a_key_go_together(attend) -> None:
    def forward(m, x):
        return attend(m, x)

    model = without(program(forward, **projections(2)), values=[1])
    assert widths(run(PASS, model, X, redraw=False)) == [8, 4, 4, 8]
    model = without(program(forward, **projections(2)), outputs=[0, 1])
    assert widths(run(PASS, model, X, redraw=False)) == [8, 4, 4, 8]
    model = without(program(forward, **projections(2)), outputs=[1, 2])  # one of each group
    run(PASS, model, X, redraw=False).stays()


def chunked(m, x):
    q, k, v = m.v(x).chunk(3, -1)
    return m.o(merged(F.scaled_dot_product_attention(split(q), split(k), split(v))))


def unbound(m, x):
    q, k, v = m.v(x).reshape(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def selected(m, x):
    qkv = m.v(x).reshape(*x.shape[:2], 3, H, D).transpose(1, 3)
    return m.o(merged(F.scaled_dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])))


@pytest.mark.parametrize("attend", [chunked, unbound, selected])
@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch", 1: "seq"}}])
def test_one_projection_to_all_three(attend, dynamic) -> None:
    """Zero values are told from zero queries where the three are split, and where they are stacked."""

    def forward(m, x):
        return attend(m, x)

    model = program(forward, v=nn.Linear(16, 3 * H * D), o=nn.Linear(H * D, 16))
    without(model, values=[2 * H + 1], outputs=[2])
    ran = run([remove_noops.PASS, PASS], model, X, redraw=False, dynamic=dynamic)
    assert widths(ran) == [24, 8]
    assert ran.kept[PASS.name] == 1
    if dynamic is not None:
        ran.agrees(randn(3, 4, 16)).agrees(randn(1, 9, 16))


@pytest.mark.parametrize("part", [0, 1])
def test_zero_queries_and_keys_in_a_stack_stay(part: int) -> None:
    def forward(m, x):
        return unbound(m, x)

    model = program(forward, v=nn.Linear(16, 3 * H * D), o=nn.Linear(H * D, 16))
    run(PASS, without(model, values=[part * H + 1]), X, redraw=False).stays()


def sliced(m, x):
    qkv = m.v(x).reshape(*x.shape[:2], 3, H, D).transpose(1, 3)
    q, k, v = (qkv[:, :, i : i + 1].squeeze(2) for i in range(3))
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def test_zero_values_in_a_stack_that_is_sliced_are_refused() -> None:
    model = program(sliced, v=nn.Linear(16, 3 * H * D), o=nn.Linear(H * D, 16))
    ran = run(PASS, without(model, values=[2 * H + 1]), X, redraw=False)
    ran.refuses("1 of 4 heads are zero, but (view|reshape) stacks 3 parts of one projection")


def split_unequally(m, x):
    q, k, v = m.v(x).split([H * D, 2 * D, 2 * D], -1)
    return m.o(merged(F.scaled_dot_product_attention(split(q), split(k, 2), split(v, 2), enable_gqa=True)))


def test_parts_of_unequal_size_are_refused() -> None:
    model = program(split_unequally, v=nn.Linear(16, 2 * H * D), o=nn.Linear(H * D, 16))
    ran = run(PASS, without(model, outputs=[0, 1]), X, redraw=False)
    ran.refuses("1 of 2 heads are zero, but the parts of split_with_sizes differ in size")


def test_all_but_one_head_may_go() -> None:
    def forward(m, x):
        return fused(m, x)

    model = without(program(forward, **projections()), values=range(4))
    assert widths(run(PASS, model, X, redraw=False)) == [4, 4, 4, 4]


def test_heads_of_zero_queries_stay() -> None:
    """They attend to all alike, and so add the mean of the values."""

    def forward(m, x):
        return fused(m, x)

    model = without(program(forward, **projections()))
    with torch.no_grad():
        model.q.weight[:D] = model.q.bias[:D] = 0
    run(PASS, model, X, redraw=False).stays()


def test_a_head_with_a_bias_stays() -> None:
    def forward(m, x):
        return fused(m, x)

    model = without(program(forward, **projections()))
    with torch.no_grad():
        model.v.weight[:D] = 0
    run(PASS, model, X, redraw=False).stays()


def test_heads_that_are_mixed_are_refused() -> None:
    def forward(m, x):
        attended = F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)))
        return m.o(F.layer_norm(merged(attended), (16,)))

    model = without(program(forward, **projections()), values=[1])
    ran = run(PASS, model, X, redraw=False)
    ran.refuses("1 of 4 heads are zero, but layer_norm mixes the channels")


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return fused(m, x)

    model = without(program(forward, **projections()), values=[1], outputs=[3])
    ran = run(PASS, model, X, redraw=False, dynamic={"x": {0: "batch", 1: "seq"}})
    assert widths(ran) == [8, 8, 8, 8]
    ran.agrees(randn(3, 4, 16)).agrees(randn(1, 9, 16))


def prune(example: Example, value: str, head: int, size: int) -> Ran:
    parameters = dict(example.model.named_parameters())
    with torch.no_grad():
        for name, weight in parameters.items():
            if value in name:
                weight.narrow(int("c_attn.weight" in name), head * size, size).zero_()
    return run([*BEFORE, PASS], example.model, kwargs=example.kwargs, dynamic=example.dynamic, redraw=False)


def test_bert() -> None:
    ran = prune(models.bert(), "attention.self.value", 1, 8)
    assert ran.kept[PASS.name] == 2
    ran.agrees(tokens(3, 4), padding((4, 3, 1), 4), tokens(3, 4) % 2)


def test_llama_loses_a_group() -> None:
    ran = prune(models.llama(), "v_proj", 1, 4)
    assert ran.kept[PASS.name] == 2
    ran.agrees(tokens(3, 4), padding((4, 3, 1), 4))


def test_t5_has_a_position_bias_for_every_head() -> None:
    """All layers share it: a head goes in none of them."""
    example = models.t5()
    with torch.no_grad():
        for name, weight in example.model.named_parameters():
            if ".SelfAttention.v." in name:
                weight[:8] = 0
    ran = run([*BEFORE, PASS], example.model, kwargs=example.kwargs, redraw=False)
    ran.refuses("1 of 2 heads are zero, but scaled_dot_product_attention mixes the channels")


def test_gpt2() -> None:
    ran = prune(models.gpt2(), "c_attn", 5, 8)
    assert ran.kept[PASS.name] == 2
    ran.agrees(tokens(3, 4))
