from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from graphopt.kernels.rms_norm import OP as RMS_NORM
from graphopt.passes.fold_norm_affine import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


def test_layer_norm() -> None:
    def forward(m, x):
        return m.linear(m.norm(x))

    of = "linear.weight, linear.bias, norm.weight, norm.bias"
    run(PASS, program(forward, norm=nn.LayerNorm(8), linear=nn.Linear(8, 6)), X).becomes(
        before="""
            %0 = layer_norm(x, [8], norm.weight, norm.bias, 1e-05, False)
            %1 = linear(%0, linear.weight, linear.bias)
            return %1
        """,
        expected=f"""
            %0 = layer_norm(x, [8], None, None, 1e-05, False)
            %1 = linear(%0, <norm's weights folded: {of}>, <norm's weights folded: {of}>)
            return %1
        """,
    )


def test_three_readers_and_moves() -> None:
    def forward(m, x):
        y = m.norm(x)
        return m.q(y), m.k(y.transpose(0, 1)), m.v(y.reshape(-1, 8))

    layers = {name: nn.Linear(8, 8, bias=name == "q") for name in "qkv"}
    ran = run(PASS, program(forward, norm=nn.LayerNorm(8, bias=False), **layers), X)
    ran.counts(linear=3, layer_norm=1)
    assert ran.kept == {PASS.name: 1}


def test_rms_norms() -> None:
    def forward(m, x):
        one = m.linear(F.rms_norm(x, (8,), m.w, 1e-6))
        return one, m.linear(RMS_NORM.overload(x, m.w, 1e-6))

    ran = run(PASS, program(forward, w=randn(8), linear=nn.Linear(8, 6)), X)
    assert ran.kept == {PASS.name: 2}


def test_another_reader_is_refused() -> None:
    def forward(m, x):
        y = m.norm(x)
        return m.linear(y) + y

    ran = run(PASS, program(forward, norm=nn.LayerNorm(8), linear=nn.Linear(8, 8)), X)
    ran.refuses("layer_norm is also read by what is no projection")


def test_weights_that_are_inputs_are_refused() -> None:
    def forward(m, x, g, w):
        return m.linear(F.layer_norm(x, (8,), g)), F.linear(m.norm(x), w)

    model = program(forward, norm=nn.LayerNorm(8), linear=nn.Linear(8, 6))
    ran = run(PASS, model, X, randn(8), randn(6, 8))
    ran.refuses("the norm's weight is not a constant").refuses("^w is not a constant")


def test_a_head_that_shares_the_table_is_refused() -> None:
    def forward(m, ids):
        return F.linear(m.norm(m.table(ids)), m.table.weight)

    model = program(forward, norm=nn.LayerNorm(8), table=nn.Embedding(9, 8))
    run(PASS, model, (X[..., 0] > 0).long()).refuses("the weight is also read by embedding: it would be held")


def test_other_norms_stay() -> None:
    def forward(m, x):
        return m.linear(m.bare(x)), m.linear(m.square(x)), m.linear(m.norm(x).sin())

    layers = {"bare": nn.LayerNorm(8, elementwise_affine=False), "square": nn.LayerNorm((5, 8))}
    run(PASS, program(forward, linear=nn.Linear(8, 6), norm=nn.LayerNorm(8), **layers), X).stays()


def test_half_precision() -> None:
    def forward(m, x):
        return m.linear(m.norm(x))

    model = program(forward, norm=nn.LayerNorm(8), linear=nn.Linear(8, 6)).bfloat16()
    assert run(PASS, model, X.bfloat16()).kept == {PASS.name: 1}


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return m.linear(m.norm(x))

    model = program(forward, norm=nn.LayerNorm(8), linear=nn.Linear(8, 6))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}})
    assert ran.kept == {PASS.name: 1}
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 1, 8))
