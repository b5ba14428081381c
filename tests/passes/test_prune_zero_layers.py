from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.prune_zero_layers import PASS
from tests._models import randn, randomised
from tests.passes._harness import program, run

X = randn(2, 5, 8)
IMAGE = randn(2, 4, 6, 6)


def zeroed(forward, bias: bool = False, **layers) -> nn.Module:
    """The model with random weights, those of its layer ``out`` zero; its bias stays if asked for."""
    model = randomised(program(forward, **layers))
    with torch.no_grad():
        model.out.weight.zero_()
        if model.out.bias is not None and not bias:
            model.out.bias.zero_()
    return model


def test_a_branch_of_zeros_goes() -> None:
    def forward(m, x):
        return x + m.out(F.gelu(m.up(x)))

    model = zeroed(forward, up=nn.Linear(8, 12), out=nn.Linear(12, 8))
    run(PASS, model, X, redraw=False).becomes(
        "return x",
        before="""
            %0 = linear(x, up.weight, up.bias)
            %1 = gelu(%0)
            %2 = linear(%1, out.weight, out.bias)
            %3 = add(x, %2)
            return %3
        """,
    )


def test_its_bias_stays() -> None:
    def forward(m, x):
        return m.out(m.up(x)) + x, x - m.out(x)

    model = zeroed(forward, True, up=nn.Linear(8, 8), out=nn.Linear(8, 8))
    ran = run(PASS, model, X, redraw=False)
    ran.becomes("%0 = add(x, out.bias)\n%1 = sub(x, out.bias)\nreturn %0, %1")


def test_the_bias_of_a_convolution() -> None:
    def forward(m, x):
        return x + m.out(F.relu(x))

    model = zeroed(forward, True, out=nn.Conv2d(4, 4, 3, padding=1))
    ran = run(PASS, model, IMAGE, redraw=False)
    ran.becomes("%0 = add(x, <reshaped: out.bias>)\nreturn %0")


BRANCHES = {
    "dropped out": lambda m, x: x + F.dropout(m.out(x), 0.1, False),
    "scaled": lambda m, x: x + m.out(x) * m.scale,
    "gated": lambda m, x: x + x.sigmoid() * m.out(x),
    "activated": lambda m, x: x + F.gelu(F.relu(-m.out(x))),
    "reshaped": lambda m, x: x + m.out(x.reshape(-1, 8)).view(2, 5, 8),
    "transposed": lambda m, x: x + m.out(x.transpose(0, 1)).permute(1, 0, 2),
    "subtracted": lambda m, x: x - m.out(x),
    "first": lambda m, x: m.out(x) + x,
    "twice": lambda m, x: torch.add(x, m.out(x), alpha=2),
    "cast": lambda m, x: x + m.out(x).double().float(),
    "one token for all": lambda m, x: x + m.out(x[:, :1]),
}


def test_what_keeps_zeros() -> None:
    def forward(m, x):
        return [branch(m, x).sin() for branch in BRANCHES.values()]

    model = zeroed(forward, out=nn.Linear(8, 8), scale=randn(8))
    ran = run(PASS, model, X, redraw=False)
    assert {node.args for node in ran.graph.calls} == {(ran.graph.placeholders[0],)}


def test_a_gate_of_zeros() -> None:
    def forward(m, x):
        return x + m.up(x) * m.scale

    model = program(forward, up=nn.Linear(8, 8), scale=torch.zeros(8))
    run(PASS, randomised(model).requires_grad_(False) and model, X, redraw=False).stays()
    with torch.no_grad():
        model.scale.zero_()
    run(PASS, model, X, redraw=False).becomes("return x")


def test_a_chain_of_layers() -> None:
    def forward(m, x):
        x = x + m.out(x)
        return x + m.out(F.relu(x))

    run(PASS, zeroed(forward, out=nn.Linear(8, 8)), X, redraw=False).becomes("return x")


OTHERS = {
    "times the number 0": lambda m, x: x + m.up(x) * 0,
    "subtracted from": lambda m, x: m.out(x) - x,
    "a sigmoid": lambda m, x: x + m.out(x).sigmoid(),
    "another layer": lambda m, x: x + m.up(x),
    "divided by an input": lambda m, x: x + m.out(x) / x,
}


def test_what_adds_something_stays() -> None:
    def forward(m, x):
        return [branch(m, x) for branch in OTHERS.values()]

    model = zeroed(forward, out=nn.Linear(8, 8), up=nn.Linear(8, 8))
    run(PASS, model, X, redraw=False).stays()


def test_a_branch_that_broadcasts_the_stream_is_refused() -> None:
    def forward(m, x):
        return x[:, :1] + m.out(x)

    run(PASS, zeroed(forward, out=nn.Linear(8, 8)), X, redraw=False).refuses(
        r"the branch is zero, but it turns \[2, 1, 8\] into \[2, 5, 8\]"
    )


def test_a_constant_that_is_changed_is_refused() -> None:
    def forward(m, x):
        return x + F.relu(m.out(x))

    run(PASS, zeroed(forward, True, out=nn.Linear(8, 8)), X, redraw=False).refuses("not added as it is")


@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_sizes(bias: bool) -> None:
    def forward(m, x):
        return x + m.out(m.up(x.reshape(-1, 8)).relu()).reshape(x.shape) if not bias else x + m.out(m.up(x))

    model = zeroed(forward, bias, up=nn.Linear(8, 12), out=nn.Linear(12, 8))
    ran = run(PASS, model, X, redraw=False, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(linear=0).agrees(randn(3, 4, 8)).agrees(randn(1, 9, 8))
