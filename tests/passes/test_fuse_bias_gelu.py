from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.ir import provenance
from graphopt.passes.fuse_bias_gelu import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_projection_with_gelu_is_fused(approximate: str) -> None:
    def forward(m, x):
        return F.gelu(m.fc(x), approximate=approximate)

    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X)
    ran.becomes(f"""
        %0 = linear(x, fc.weight)
        %1 = graphopt.bias_gelu(%0, fc.bias, {approximate})
        return %1
    """)


def test_where_it_comes_from() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.gelu(y)

    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X)
    linear, gelu = (provenance.of(node) for node in ran.graph.calls)
    captured = [node.name for node in ran.captured.calls]
    assert linear.origins == gelu.origins == tuple(captured)
    assert gelu.file == __file__
    assert gelu.line == forward.__code__.co_firstlineno + 2


def test_a_projection_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.gelu(y) + y

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).refuses("linear is also read by add")


def test_a_projection_that_is_returned_is_refused() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.gelu(y), y

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).refuses("linear is also read by output")


def test_without_a_bias_it_stays() -> None:
    def forward(m, x):
        return F.gelu(m.fc(x))

    run(PASS, program(forward, fc=nn.Linear(8, 12, bias=False)), X).stays()


@pytest.mark.parametrize("other", [torch.relu, torch.sigmoid, F.silu])
def test_another_activation_stays(other) -> None:
    def forward(m, x):
        return other(m.fc(x))

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).stays()


def test_one_projection_for_two_activations() -> None:
    def forward(m, x):
        return F.gelu(m.fc(x)), F.gelu(m.fc(x), approximate="tanh")

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).counts(bias_gelu=2, linear=2, gelu=0)


def test_the_weight_may_be_an_input() -> None:
    def forward(m, x, w):
        return F.gelu(F.linear(x, w, m.b))

    ran = run(PASS, program(forward, b=torch.zeros(12)), X, randn(12, 8, seed=1))
    ran.counts(bias_gelu=1)


def test_half_precision() -> None:
    def forward(m, x):
        return F.gelu(m.fc(x))

    run(PASS, program(forward, fc=nn.Linear(8, 12).bfloat16()), X.bfloat16()).counts(bias_gelu=1)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return F.gelu(m.fc(x))

    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(bias_gelu=1).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))
