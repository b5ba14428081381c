from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.ir import provenance
from graphopt.passes.fuse_linear_activation import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_projection_with_gelu_is_fused(approximate: str) -> None:
    def forward(m, x):
        return F.gelu(m.fc(x), approximate=approximate)

    name = {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X)
    ran.becomes(
        before=f"""
            %0 = linear(x, fc.weight, fc.bias)
            %1 = gelu(%0{"" if approximate == "none" else ", approximate=tanh"})
            return %1
        """,
        expected=f"""
            %0 = graphopt.linear_activation(x, fc.weight, fc.bias, {name}, 1, None)
            return %0
        """,
    )


def test_every_activation() -> None:
    plain = (
        F.relu,
        F.relu6,
        F.sigmoid,
        F.tanh,
        F.softplus,
        F.silu,
        F.mish,
        F.hardswish,
        F.hardsigmoid,
        F.selu,
    )

    def forward(m, x):
        outs = [function(m.fc(x)) for function in plain]
        return (*outs, F.leaky_relu(m.fc(x), 0.2), F.elu(m.fc(x), 0.5))

    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X)
    ran.counts(linear_activation=len(plain) + 2, linear=0)
    named = {node.args[3]: node.args[4] for node in ran.graph.calls}
    assert (named["leaky_relu"], named["elu"]) == (0.2, 0.5)


def test_a_residual_behind_the_activation() -> None:
    def forward(m, x):
        return x + F.silu(m.fc(x))

    run(PASS, program(forward, fc=nn.Linear(8, 8)), X).becomes("""
        %0 = graphopt.linear_activation(x, fc.weight, fc.bias, silu, 1, x)
        return %0
    """)


@pytest.mark.parametrize(
    "combine",
    [lambda y, r: y + r[0], lambda y, r: torch.add(y, r, alpha=2), lambda y, r: y + y, lambda y, r: y + 1],
    ids=["broadcast", "scaled", "itself", "a number"],
)
def test_another_sum_is_no_residual(combine) -> None:
    def forward(m, x):
        return combine(F.relu(m.fc(x)), x)

    ran = run(PASS, program(forward, fc=nn.Linear(8, 8)), X).counts(linear_activation=1, add=1)
    (fused,) = (node for node in ran.graph.calls if "linear_activation" in str(node.target))
    assert fused.args[5] is None


def test_where_it_comes_from() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.gelu(y)

    ran = run(PASS, program(forward, fc=nn.Linear(8, 12)), X)
    (fused,) = (provenance.of(node) for node in ran.graph.calls)
    assert fused.origins == tuple(node.name for node in ran.captured.calls)
    assert fused.file == __file__
    assert fused.line == forward.__code__.co_firstlineno + 2


def test_a_projection_that_is_read_twice_is_refused() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.gelu(y) + y

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).refuses("linear is also read by ")


def test_a_projection_that_is_returned_is_refused() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.gelu(y), y

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).refuses("linear is also read by output")


def test_a_vector_for_a_weight_is_refused() -> None:
    def forward(m, x):
        return F.relu(F.linear(x, m.w))

    run(PASS, program(forward, w=randn(8)), X).refuses("the weight has 1 dimensions, not 2")


def test_without_a_bias() -> None:
    def forward(m, x):
        return F.gelu(m.fc(x))

    run(PASS, program(forward, fc=nn.Linear(8, 12, bias=False)), X).counts(linear_activation=1, linear=0)


def test_forms_of_activations_without_a_name_stay() -> None:
    def forward(m, x):
        return F.softplus(m.fc(x), beta=2), torch.ops.aten.elu(m.fc(x), 1, 2)

    run(PASS, program(forward, fc=nn.Linear(8, 12)), X).stays()


def test_the_weight_may_be_an_input() -> None:
    def forward(m, x, w):
        return F.gelu(F.linear(x, w, m.b))

    ran = run(PASS, program(forward, b=torch.zeros(12)), X, randn(12, 8, seed=1))
    ran.counts(linear_activation=1)


def test_half_precision() -> None:
    def forward(m, x):
        return F.gelu(m.fc(x))

    model = program(forward, fc=nn.Linear(8, 12).bfloat16())
    run(PASS, model, X.bfloat16()).counts(linear_activation=1)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return F.gelu(m.fc(x)) + x

    ran = run(PASS, program(forward, fc=nn.Linear(8, 8)), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(linear_activation=1, add=0).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))
