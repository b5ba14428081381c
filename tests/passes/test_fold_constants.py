from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ir import provenance
from graphopt.passes.fold_constants import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(3, 4)
W = randn(4)


def test_what_depends_on_weights_alone() -> None:
    def forward(m, x):
        return x * (1 + m.w.exp())

    ran = run(PASS, program(forward, w=W), X)
    ran.becomes("""
        %0 = mul(x, <aten.add.Tensor of aten.exp.default: w>)
        return %0
    """)
    (folded,) = ran.graph.constants.values()
    assert torch.equal(folded.tensor, 1 + dict(ran.model.named_parameters())["w"].exp())


def test_what_depends_on_nothing() -> None:
    def forward(m, x):
        return x + torch.arange(4) * 2.0

    run(PASS, program(forward), X).becomes("""
        %0 = add(x, <aten.mul.Tensor of aten.arange.default: >)
        return %0
    """)


def test_where_it_comes_from() -> None:
    def forward(m, x):
        table = m.w.exp()
        table = table + m.v
        return x * table

    ran = run(PASS, program(forward, w=W, v=randn(4, seed=1)), X)
    (folded,) = (c for c in ran.graph.constants.values() if c.how)
    assert folded.sources == ("w", "v")
    (constant,) = (node for node in ran.graph.nodes if node.op == "get_attr")
    place = provenance.of(constant)
    assert set(place.origins) == {"exp", "add"}
    assert place.line == forward.__code__.co_firstlineno + 2


def test_one_constant_for_several_readers() -> None:
    def forward(m, x):
        table = m.w.exp()
        return x * table, x + table, table.sin() + x

    ran = run(PASS, program(forward, w=W), X)
    assert len(ran.graph.constants) == 2
    ran.counts(exp=0, sin=0, mul=1, add=2)


def test_a_constant_that_is_returned() -> None:
    def forward(m, x):
        return x, m.w.exp()

    run(PASS, program(forward, w=W), X).becomes("return x, <aten.exp.default: w>")


def test_several_results() -> None:
    def forward(m, x):
        low, high = m.w.split(2)
        return x[:, :2] * low + x[:, 2:] * high

    run(PASS, program(forward, w=W), X).counts(split=0, getitem=0, mul=2)


def test_an_expand_is_no_constant_but_its_source_is() -> None:
    def forward(m, x):
        return m.w.exp().expand(3, 4), x

    run(PASS, program(forward, w=W), X).becomes("""
        %0 = expand(<aten.exp.default: w>, [3, 4])
        return %0, x
    """)


def test_what_follows_an_expand_is_folded() -> None:
    def forward(m, x):
        return x + m.w.exp().expand(3, 4).cumsum(0)

    run(PASS, program(forward, w=W), X).counts(exp=0, expand=0, cumsum=0, add=1)


def test_a_constant_that_is_much_larger_is_refused() -> None:
    def forward(m, x):
        return x.sum() + torch.outer(m.w, m.w)

    ran = run(PASS, program(forward, w=randn(2100)), X)
    ran.refuses("the constant would be 17 MiB larger than what it is made from")


def test_a_bias_that_is_repeated_for_every_sequence_is_held_once() -> None:
    def forward(m, x):
        bias = m.w[:, None, None] * torch.arange(5.0)
        mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
        return x + (bias + torch.where(mask, 0.0, -1e9))

    ran = run(PASS, program(forward, w=W), randn(2, 4, 5, 5))
    ran.counts(expand=1, add=1, mul=0, where=0)
    assert [tuple(c.tensor.shape) for c in ran.graph.constants.values()] == [(1, 4, 5, 5)]


def test_what_is_large_only_because_it_is_repeated_is_folded() -> None:
    def forward(m, x):
        return x.sum() + m.w.expand(3000, 2, 2100).sin()

    ran = run(PASS, program(forward, w=randn(2100)), X).counts(sin=0, expand=1)
    assert [tuple(c.tensor.shape) for c in ran.graph.constants.values()] == [(1, 1, 2100)]


def test_randomness_stays() -> None:
    def forward(m, x):
        noise = F.dropout(m.w, 0.5, True) + torch.rand(4) + torch.bernoulli(m.w.sigmoid())
        return x + noise * 0

    ran = run(PASS, program(forward, w=W), X)
    ran.counts(native_dropout=1, rand=1, bernoulli=1, sigmoid=0)


def test_what_depends_on_an_input_stays() -> None:
    def forward(m, x):
        return x.exp() + m.w

    run(PASS, program(forward, w=W), X).stays()


def test_half_precision() -> None:
    def forward(m, x):
        return x * m.w.exp().float().log()

    run(PASS, program(forward, w=W.bfloat16()), X).counts(exp=0, mul=1)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        fixed, varying = torch.arange(4).exp(), torch.arange(x.shape[0]).exp()
        return x * fixed + varying[:, None]

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch"}})
    ran.counts(arange=1, exp=1).agrees(randn(5, 4)).agrees(randn(1, 4))
