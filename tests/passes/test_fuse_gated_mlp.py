from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from graphopt.passes import (
    fold_constants,
    fold_weight_layout,
    fuse_activation,
    merge_common_subexpressions,
)
from graphopt.passes.fuse_gated_mlp import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def gated(activation, **layers: nn.Module) -> nn.Module:
    def forward(m, x):
        return activation(m.gate(x)) * m.up(x)

    layers.setdefault("gate", nn.Linear(8, 12, bias=False))
    layers.setdefault("up", nn.Linear(8, 12, bias=False))
    return program(forward, **layers)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    run(PASS, gated(ACTIVATIONS[name]), X).becomes(
        f"%0 = graphopt.gated_mlp(x, gate.weight, up.weight, None, None, {name})\nreturn %0"
    )


def test_factors_the_other_way_round_and_biases() -> None:
    def forward(m, x):
        return m.up(x) * F.silu(m.gate(x))

    ran = run(PASS, program(forward, gate=nn.Linear(8, 12), up=nn.Linear(8, 12)), X)
    ran.becomes("""
        %0 = graphopt.gated_mlp(x, gate.weight, up.weight, gate.bias, up.bias, silu)
        return %0
    """)


def test_one_bias() -> None:
    run(PASS, gated(F.silu, up=nn.Linear(8, 12)), X).becomes("""
        %0 = graphopt.gated_mlp(x, gate.weight, up.weight, None, up.bias, silu)
        return %0
    """)


def test_the_block_of_llama() -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    run(PASS, LlamaMLP(config).eval(), X).counts(gated_mlp=1, linear=1, silu=0, mul=0)


def test_the_block_of_t5() -> None:
    config = T5Config(d_model=8, d_ff=12, feed_forward_proj="gated-gelu")
    ran = run([fuse_activation.PASS, PASS], T5DenseGatedActDense(config).eval(), X)
    ran.counts(gated_mlp=1, linear=1, tanh=0, gelu=0)


@pytest.mark.parametrize("rows", [1])
def test_projections_of_different_size_are_refused(rows: int) -> None:
    ran = run(PASS, gated(F.silu, up=nn.Linear(8, rows, bias=False)), X)
    ran.refuses(r"the weights have shapes \[12, 8\] and \[1, 8\], not one of two dimensions")


def test_weights_that_are_vectors_are_refused() -> None:
    def forward(m, x):
        return F.silu(F.linear(x, m.gate)) * F.linear(x, m.up)

    ran = run(PASS, program(forward, gate=randn(8), up=randn(8, seed=1)), X)
    ran.refuses(r"the weights have shapes \[8\] and \[8\], not one of two dimensions")


@pytest.mark.parametrize("which", ["gate", "up", "activated"])
def test_a_projection_that_is_read_twice_is_refused(which: str) -> None:
    def forward(m, x):
        values = {"gate": m.gate(x), "up": m.up(x)}
        values["activated"] = F.silu(values["gate"])
        return values["activated"] * values["up"], values[which]

    ran = run(PASS, program(forward, gate=nn.Linear(8, 12), up=nn.Linear(8, 12)), X)
    ran.refuses("is also read by output")


def test_projections_of_two_values_stay() -> None:
    def forward(m, x):
        return F.silu(m.gate(x)) * m.up(x.sin())

    run(PASS, program(forward, gate=nn.Linear(8, 12), up=nn.Linear(8, 12)), X).stays()


def test_a_gate_that_is_none_stays() -> None:
    run(PASS, gated(torch.tanh), X).stays()


def test_a_sum_of_both_stays() -> None:
    def forward(m, x):
        return F.silu(m.gate(x)) + m.up(x)

    run(PASS, program(forward, gate=nn.Linear(8, 12), up=nn.Linear(8, 12)), X).stays()


MERGED = {
    "chunk": lambda y: F.silu(y.chunk(2, dim=-1)[0]) * y.chunk(2, dim=-1)[1],
    "split": lambda y: torch.split(y, 12, dim=2)[1] * F.silu(torch.split(y, 12, dim=2)[0]),
    "split by sizes": lambda y: F.silu(torch.split(y, [12, 12], -1)[0]) * torch.split(y, [12, 12], -1)[1],
    "slices": lambda y: F.silu(y[..., :12]) * y[..., 12:],
}


@pytest.mark.parametrize("bias", [False, True])
def test_one_projection_for_both(bias: bool) -> None:
    def forward(m, x):
        return [function(m.fc(x)) for function in MERGED.values()]

    ran = run(PASS, program(forward, fc=nn.Linear(8, 24, bias=bias)), X)
    ran.counts(gated_mlp=4, linear=0, split=0, split_with_sizes=0, silu=0, slice=16 if bias else 8)


def test_which_half_is_the_gate() -> None:
    def forward(m, x):
        up, gate = m.fc(x).chunk(2, dim=-1)
        return up * F.gelu(gate)

    run(PASS, program(forward, fc=nn.Linear(8, 24, bias=False)), X).becomes("""
        %0 = slice(fc.weight, 0, 12, 24)
        %1 = slice(fc.weight, 0, 0, 12)
        %2 = graphopt.gated_mlp(x, %0, %1, None, None, gelu)
        return %2
    """)


def test_neighbouring_features() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.silu(y[..., ::2]) * y[..., 1::2]

    run(PASS, program(forward, fc=nn.Linear(8, 24)), X).counts(gated_mlp=1, linear=0)


def test_torchs_own_gate() -> None:
    def forward(m, x):
        return F.glu(m.fc(x))

    run(PASS, program(forward, fc=nn.Linear(8, 24, bias=False)), X).becomes("""
        %0 = slice(fc.weight, 0, 12, 24)
        %1 = slice(fc.weight, 0, 0, 12)
        %2 = graphopt.gated_mlp(x, %0, %1, None, None, sigmoid)
        return %2
    """)


def test_a_split_of_three_that_is_read_elsewhere_is_refused() -> None:
    def forward(m, x):
        gate, up, rest = m.fc(x).split(8, dim=-1)
        return F.silu(gate) * up + rest

    run(PASS, program(forward, fc=nn.Linear(8, 24)), X).refuses("split is also read by getitem")


def test_parts_of_other_dimensions_stay() -> None:
    def forward(m, x):
        y = m.fc(x)
        return F.silu(y[:, :2]) * y[:, 2:4], F.glu(y, dim=0)

    run(PASS, program(forward, fc=nn.Linear(8, 24)), X).stays()


def test_shared_weights() -> None:
    shared = nn.Linear(8, 12)
    run(PASS, gated(F.silu, gate=shared, up=shared), X).counts(gated_mlp=1)


def test_weights_that_are_inputs() -> None:
    def forward(m, x, w):
        return F.silu(F.linear(x, w)) * F.linear(x, m.up)

    run(PASS, program(forward, up=randn(12, 8)), X, randn(12, 8, seed=1)).counts(gated_mlp=1)


EXPERTS = {
    "einsum": lambda x, w: torch.einsum("bsd,edi->bsei", x, w),
    "einsum, experts first": lambda x, w: torch.einsum("bsd,edi->ebsi", x, w),
    "matmul": lambda x, w: x.unsqueeze(1) @ w,
    "bmm": lambda x, w: torch.bmm(x.reshape(-1, 8).unsqueeze(0).expand(3, -1, -1), w),
}


@pytest.mark.parametrize("spelled", EXPERTS.values(), ids=EXPERTS)
def test_experts_side_by_side(spelled) -> None:
    def forward(m, x):
        return F.silu(spelled(x, m.gate)) * spelled(x, m.up)

    model = program(forward, gate=randn(3, 8, 12), up=randn(3, 8, 12, seed=1))
    passes = [fold_weight_layout.PASS, merge_common_subexpressions.PASS, PASS]
    ran = run(passes, model, X)
    ran.counts(gated_mlp=1, linear=0, silu=0, mul=0)


def test_experts_one_by_one() -> None:
    def forward(m, x):
        share = m.router(x).softmax(-1)
        out = x
        for expert in range(3):
            hidden = F.silu(x @ m.gate[expert]) * (x @ m.up[expert])
            out = out + share[..., expert, None] * (hidden @ m.down[expert])
        return out

    weights = {"gate": randn(3, 8, 12), "up": randn(3, 8, 12, seed=1), "down": randn(3, 12, 8)}
    passes = [fold_constants.PASS, fold_weight_layout.PASS, PASS]
    run(passes, program(forward, router=nn.Linear(8, 3), **weights), X).counts(gated_mlp=3, silu=0)


def test_views_of_one_side_stay() -> None:
    def forward(m, x):
        return F.silu(m.gate(x)).view(2, 5, 3, 4) * m.up(x).view(2, 5, 3, 4), (
            F.silu(m.gate(x).transpose(1, 2)) * m.up(x).sum(1, keepdim=True).transpose(1, 2)
        )

    layers = {"gate": nn.Linear(8, 12), "up": nn.Linear(8, 12)}
    run(PASS, program(forward, **layers), X).stays()


def test_dynamic_experts() -> None:
    def forward(m, x):
        return F.silu(torch.einsum("bsd,edi->bsei", x, m.gate)) * torch.einsum("bsd,edi->bsei", x, m.up)

    model = program(forward, gate=randn(3, 8, 12), up=randn(3, 8, 12, seed=1))
    ran = run([fold_weight_layout.PASS, PASS], model, X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(gated_mlp=1).agrees(randn(3, 4, 8)).agrees(randn(1, 1, 8))


def test_dynamic_sizes() -> None:
    ran = run(PASS, gated(F.silu), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(gated_mlp=1).agrees(randn(3, 2, 8)).agrees(randn(1, 9, 8))


@pytest.mark.parametrize(("sizes", "dim"), [((2, 12), -2), ((12, 2), -1)])
def test_gate_and_up_behind_a_reshape(sizes: tuple[int, int], dim: int) -> None:
    def unbound(m, x):
        gate, up = m.both(x).unflatten(-1, sizes).unbind(dim)
        return F.silu(gate) * up

    def selected(m, x):
        both = m.both(x).view(*x.shape[:-1], *sizes)
        return both.select(dim, 1) * F.gelu(both.select(dim, 0))

    for forward in (unbound, selected):
        run(PASS, program(forward, both=nn.Linear(8, 24)), X).counts(gated_mlp=1, linear=0, mul=0, reshape=0)


def test_a_reshape_of_other_dimensions_stays() -> None:
    def forward(m, x):
        gate, up = m.both(x).view(2, 30, 4).unbind(0)
        return F.silu(gate) * up

    run(PASS, program(forward, both=nn.Linear(8, 24)), X).stays()
