from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.default import pipeline
from graphopt.passes.sink_views import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


class Block(nn.Module):
    """A block of torchvision's vision transformer, whose attention is torch.nn.MultiheadAttention."""

    def __init__(self, width: int = 16, heads: int = 4, batch_first: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        attended, _ = self.attention(y, y, y, need_weights=False)
        x = x + attended
        return x + self.mlp(self.second(x))


def test_transposes_around_a_projection_cancel() -> None:
    def forward(m, x):
        return F.linear(x.transpose(0, 1), m.w, m.b).transpose(0, 1).relu()

    run(PASS, program(forward, w=randn(6, 8), b=randn(6)), X).becomes(
        """
        %0 = linear(x, w, b)
        %1 = relu(%0)
        return %1
        """,
        before="""
            %0 = transpose(x, 0, 1)
            %1 = linear(%0, w, b)
            %2 = transpose(%1, 0, 1)
            %3 = relu(%2)
            return %3
        """,
    )


def test_a_packed_projection_is_taken_apart_where_it_lies() -> None:
    def forward(m, x):
        packed = F.linear(x.transpose(0, 1), m.w)
        parts = packed.unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        return [parts[i].reshape(5, 4, 4).transpose(0, 1).reshape(2, 2, 5, 4).cumsum(2) for i in range(3)]

    run(PASS, program(forward, w=randn(24, 8)), X).becomes("""
        %0 = linear(x, w)
        %1 = reshape(%0, [2, 5, 3, 2, 4])
        %2 = select(%1, 2, 2)
        %3 = transpose(%2, 1, 2)
        %4 = select(%1, 2, 1)
        %5 = transpose(%4, 1, 2)
        %6 = select(%1, 2, 0)
        %7 = transpose(%6, 1, 2)
        %8 = cumsum(%7, 2)
        %9 = cumsum(%5, 2)
        %10 = cumsum(%3, 2)
        return %8, %9, %10
    """)


def test_what_attention_returns_is_read_as_it_lies() -> None:
    def forward(m, x):
        heads = x.relu()  # (batch, heads, length, features)
        rows = heads.permute(2, 0, 1, 3).reshape(5 * 2, 8)
        return F.linear(rows, m.w).view(5, 2, 6).transpose(0, 1).sin()

    run(PASS, program(forward, w=randn(6, 8)), randn(2, 4, 5, 2)).becomes("""
        %0 = relu(x)
        %1 = transpose(%0, 1, 2)
        %2 = reshape(%1, [2, 5, 8])
        %3 = linear(%2, w)
        %4 = sin(%3)
        return %4
    """)


def test_attention_of_torch_has_no_transpose_left() -> None:
    """Nor a copy: queries, keys and values are views of the product, its result is read as it lies."""
    ran = run(pipeline(), Block(), randn(3, 5, 16))
    ran.becomes("""
        %0 = layer_norm(x, [16], first.weight, first.bias, 1e-05, False)
        %1 = linear(%0, attention.in_proj_weight, attention.in_proj_bias)
        %2 = reshape(%1, [3, 5, 3, 4, 4])
        %3 = select(%2, 2, 2)
        %4 = select(%2, 2, 1)
        %5 = select(%2, 2, 0)
        %6 = graphopt.attention(%5, %4, %3, None, False, None)
        %7 = reshape(%6, [3, 5, 16])
        %8 = linear(%7, attention.out_proj.weight, attention.out_proj.bias)
        %9 = graphopt.add_layer_norm(x, %8, second.weight, second.bias, 1e-05)
        %10 = getitem(%9, 0)
        %11 = getitem(%9, 1)
        %12 = graphopt.linear_activation(%10, mlp.0.weight, mlp.0.bias, gelu, 1, None)
        %13 = linear(%12, mlp.2.weight, mlp.2.bias)
        %14 = add(%11, %13)
        return %14
    """)


@pytest.mark.parametrize("sizes", [(3, 5, 16), (1, 5, 16)])
def test_whatever_the_batch(sizes: tuple[int, ...]) -> None:
    ran = run(pipeline(), Block(), randn(*sizes))
    ran.counts(transpose=0, permute=0, reshape=2, select=3, linear=3, attention=1)


def test_a_dynamic_batch() -> None:
    ran = run(pipeline(), Block(), randn(3, 5, 16), dynamic={"x": {0: "batch"}})
    ran.counts(transpose=0, permute=0, reshape=2, select=3, attention=1)
    ran.agrees(randn(2, 5, 16)).agrees(randn(7, 5, 16))


def test_what_would_stay_as_long_is_refused() -> None:
    def forward(m, x):
        return F.linear(x.transpose(0, 1), m.w).reshape(5, 2, 3, 2).sin()

    run(PASS, program(forward, w=randn(6, 8)), X).refuses(
        "2 views, of which 1 copy, would be 2, of which 0 copy"
    )


def test_what_would_copy_more_is_refused() -> None:
    """The rows are copied once in front, and would be for each of two values behind."""

    def forward(m, x):
        made = F.linear(x.transpose(0, 1), m.w)
        return made.unsqueeze(2).reshape(10, 6).cumsum(0), made.unsqueeze(0).reshape(5, 12).cumsum(0)

    ran = run(PASS, program(forward, w=randn(6, 8)), X)
    ran.refuses("5 views, of which 1 copy, would be 3, of which 2 copy")


def test_whatever_works_on_rows() -> None:
    def forward(m, x, y):
        x, y = x.transpose(0, 1), y.permute(1, 0, 2)
        rows = F.layer_norm(x + y * m.scale, (8,), m.scale)
        gate, up = F.linear(rows, m.w).chunk(2, -1)
        return (x + F.silu(gate) * up).transpose(0, 1), torch.cat([x, rows], -1).softmax(-1).transpose(0, 1)

    weights = {"w": randn(16, 8), "scale": randn(8)}
    ran = run(PASS, program(forward, **weights), X, randn(2, 5, 8, seed=1))
    ran.counts(transpose=0, permute=0, linear=1, layer_norm=1, cat=1, softmax=1, split=1)


def test_an_encoder_that_keeps_positions_in_front() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block(batch_first=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.transpose(0, 1)
            for layer in self.layers:
                x = layer(x)
            return x.transpose(0, 1)

    ran = run(pipeline(), Encoder(), randn(3, 5, 16), dynamic={"x": {0: "batch"}})
    ran.counts(transpose=0, permute=0, reshape=4, select=6, attention=2, add_layer_norm=3)
    ran.agrees(randn(2, 5, 16)).agrees(randn(7, 5, 16))


def test_one_value_that_lies_otherwise_is_permuted_for_all() -> None:
    def forward(m, x, y):
        x = x.transpose(0, 1)
        for _ in range(2):
            x = (x.transpose(0, 1).relu().transpose(0, 1) + y).sin()
        return x.transpose(0, 1)

    ran = run(PASS, program(forward), X, randn(5, 2, 8)).counts(transpose=1)
    (moved,) = (node for node in ran.graph.calls if node.target is torch.ops.aten.transpose.int)
    assert moved.args[0] is ran.graph.placeholders[1]


def test_rows_that_something_else_reads_stay() -> None:
    def forward(m, x):
        made = F.linear(x.transpose(0, 1), m.w)
        return made.transpose(0, 1).sin(), made.cumsum(0)

    run(PASS, program(forward, w=randn(6, 8)), X).stays()


def test_features_that_are_moved_stay() -> None:
    def forward(m, x):
        return F.linear(x.transpose(1, 2), m.w).transpose(1, 2).sin()

    run(PASS, program(forward, w=randn(6, 5)), X).stays()
