from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes.fold_attention_scale import PASS
from tests._models import randn
from tests.passes._harness import program, run

Q, K, V = (randn(2, 3, 5, 4, seed=i) for i in range(3))


def test_scaled_queries() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q * 0.25, k, v)

    run(PASS, program(forward), Q, K, V).becomes(
        before="""
            %0 = mul(q, 0.25)
            %1 = scaled_dot_product_attention(%0, k, v)
            return %1
        """,
        expected="""
            %0 = scaled_dot_product_attention(q, k, v, scale=0.125)
            return %0
        """,
    )


def test_both_sides_and_moves() -> None:
    def forward(m, q, k, v):
        q = (q / m.root).transpose(1, 2).contiguous().transpose(1, 2)
        return F.scaled_dot_product_attention(q, 3.0 * k, v, is_causal=True, scale=0.5)

    ran = run(PASS, program(forward, root=torch.tensor(2.0)), Q, K, V, redraw=False)
    ran.counts(mul=0, div=0, transpose=2)
    (attention,) = (n for n in ran.graph.calls if "attention" in str(n.target))
    assert attention.kwargs["scale"] == 0.75


def test_the_fused_op() -> None:
    def forward(m, q, k, v):
        return ATTENTION.overload(q * 2, k, v, None, True)

    run(PASS, program(forward), Q, K, V).becomes("""
        %0 = graphopt.attention(q, k, v, None, True, 1)
        return %0
    """)


def test_a_negative_factor_is_refused() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(-q, k, v)

    run(PASS, program(forward), Q, K, V).refuses("a scale must be above zero, not -1")


def test_a_product_that_is_read_is_refused() -> None:
    def forward(m, q, k, v):
        q = q * 0.5
        return F.scaled_dot_product_attention(q, k, v), q

    run(PASS, program(forward), Q, K, V).refuses("mul is also read by output")


def test_a_varying_head_size_is_refused() -> None:
    def forward(m, q, k, v):
        return ATTENTION.overload(q * 0.5, k, v)

    ran = run(PASS, program(forward), Q, K, V, dynamic={"q": {3: "size"}, "k": {3: "size"}})
    ran.refuses("the number of features varies: the default scale is no number")


def test_a_factor_of_each_head_stays() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q * m.heads, k + 1, v * 2)

    run(PASS, program(forward, heads=randn(3, 1, 1)), Q, K, V).stays()


def test_dynamic_sizes() -> None:
    def forward(m, q, k, v):
        return F.scaled_dot_product_attention(q * 0.5, k, v)

    sizes = {name: {0: "batch", 2: "seq"} for name in ("q", "k", "v")}
    ran = run(PASS, program(forward), Q, K, V, dynamic=sizes).counts(mul=0)
    ran.agrees(*(randn(1, 3, 7, 4, seed=i) for i in range(3)))
