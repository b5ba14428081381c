from __future__ import annotations

import torch
from transformers.models.glm.modeling_glm import rotate_half as rotate_neighbours
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

from graphopt.kernels.rope import OP as ROPE
from graphopt.passes import fold_constants, merge_common_subexpressions, remove_noops
from graphopt.passes.fuse_rope import PASS
from tests._models import randn
from tests.passes._harness import Ran, program, run

X = randn(2, 3, 5, 8)  # (batch, heads, tokens, features)
AFTER = [merge_common_subexpressions.PASS, fold_constants.PASS]
FOLDED = [remove_noops.PASS, fold_constants.PASS, merge_common_subexpressions.PASS, PASS]


def twice(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat((angles, angles), dim=-1)


def tables(positions: torch.Tensor, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as (..., tokens, width), every angle twice, as transformers makes them."""
    angles = positions[..., None] * 100.0 ** -torch.linspace(0, 1, width // 2)
    return twice(angles).cos(), twice(angles).sin()


def ropes(ran: Ran) -> int:
    return sum(node.target is ROPE.overload for node in ran.graph.calls)


def test_heads_first_is_transposed_around_the_op() -> None:
    def forward(m, x, angles):
        cos, sin = (twice(angles).cos() * 2)[:, None], twice(angles).sin()[:, None]
        return x * cos + rotate_half(x) * sin

    run(PASS, program(forward), X, randn(2, 5, 4)).becomes("""
        %0 = cos(angles)
        %1 = mul(%0, 2)
        %2 = sin(angles)
        %3 = transpose(x, 1, 2)
        %4 = graphopt.rope(%3, %1, %2)
        %5 = transpose(%4, 1, 2)
        return %5
    """)


def test_tables_that_are_constants() -> None:
    def forward(m, q, k):
        cos, sin = tables(torch.arange(5)[None])
        return apply_rotary_pos_emb(q, k, cos, sin)

    ran = run([*FOLDED, *AFTER], program(forward), X, randn(2, 2, 5, 8))
    ran.counts(rope=2, cos=0, cat=0, slice=0, neg=0)
    assert [tuple(c.tensor.shape) for c in ran.graph.constants.values()] == [(1, 5, 4)] * 2  # shared


def test_a_table_a_sequence() -> None:
    def forward(m, q, k, positions):
        cos, sin = tables(positions)
        return apply_rotary_pos_emb(q, k, cos, sin)

    ran = run(PASS, program(forward), X, randn(2, 2, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]))
    ran.counts(rope=2, cat=0, slice=0).agrees(X, randn(2, 2, 5, 8), torch.arange(10).reshape(2, 5))


def test_part_of_the_features() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions, width=4))
        turning, passing = x[..., :4], x[..., 4:]
        return torch.cat([turning * cos + rotate_half(turning) * sin, passing], dim=-1)

    ran = run(PASS, program(forward), X, torch.arange(5)[None])
    ran.counts(rope=1, cat=1, slice=2)


def test_cast_and_expanded_tables() -> None:
    def forward(m, x, positions):
        cos, sin = (table.to(torch.bfloat16)[:, None].expand(2, 1, 5, 8) for table in tables(positions))
        return sin * rotate_half(x) + cos * x

    run(PASS, program(forward), X.bfloat16(), torch.arange(5)[None]).counts(rope=1, to=2, cat=0)


def test_swapped_tables_are_swapped() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        return x * sin + rotate_half(x) * cos

    assert ropes(run(PASS, program(forward), X, torch.arange(5)[None])) == 1


def test_parts_that_are_not_halves_are_refused() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        rotated = torch.cat((-x[..., 3:], x[..., :3]), dim=-1)
        return x * cos + rotated * sin

    ran = run(PASS, program(forward), X, torch.arange(5)[None])
    ran.refuses("the rotated parts are not the halves of 8 features")


def test_rotated_features_that_others_read_are_refused() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        rotated = rotate_half(x)
        return x * cos + rotated * sin, rotated

    run(PASS, program(forward), X, torch.arange(5)[None]).refuses("cat_2 is also read by output")


def test_tables_for_tokens_first_are_refused() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, :, None] for table in tables(positions))
        return x * cos + rotate_half(x) * sin

    ran = run(PASS, program(forward), X.transpose(1, 2).contiguous(), torch.arange(5)[None])
    ran.refuses(r"the cos table has shape \[1, 5, 1, 8\], not \(batch, 1, tokens, 8\)")


def test_a_table_that_is_broadcast_is_refused() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        return x * cos + rotate_half(x) * sin

    ran = run(PASS, program(forward), X, torch.arange(1)[None])
    ran.refuses(r"the cos table has shape \[1, 1, 1, 8\], which does not fit \[2, 3, 5, 8\]")
    ran = run(PASS, program(forward), X[:1].clone(), torch.arange(10).reshape(2, 5))
    ran.refuses(r"the cos table has shape \[2, 1, 5, 8\], which does not fit \[1, 3, 5, 8\]")


def test_a_table_of_another_type_is_refused() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        return x * cos + rotate_half(x) * sin

    ran = run(PASS, program(forward), X.bfloat16(), torch.arange(5)[None])
    ran.refuses("the cos table is torch.float32, not torch.bfloat16")


def test_angles_that_are_written_once_are_refused() -> None:
    def forward(m, x, a, b):
        tables = {
            "given": b,
            "of two": torch.cat([a, a + 1], dim=-1)[:, None].cos(),
            "along the tokens": torch.cat([b[:, :, :2], b[:, :, :2], b[:, :, :1]], dim=2),
            "scaled by another": twice(a)[:, None] * b,
            "rotated": rotate_half(twice(a)[:, None]),
        }
        cos = twice(a)[:, None].cos()
        return [x * cos + rotate_half(x) * table for table in tables.values()]

    ran = run(PASS, program(forward), X, randn(2, 5, 4), randn(2, 1, 5, 8))
    ran.refuses("the sin table is not known to hold each angle twice")
    assert len(ran.remarks.of_kind("missed")) == 5


def test_constants_that_differ_in_their_halves_are_refused() -> None:
    def forward(m, x):
        return x * m.cos + rotate_half(x) * m.sin

    ran = run(PASS, program(forward, cos=randn(1, 1, 5, 8), sin=randn(1, 1, 5, 8)), X)
    ran.refuses("the cos table is not known to hold each angle twice")


def test_tables_of_different_shape_are_refused() -> None:
    def forward(m, x, a, b):
        cos, sin = twice(a)[:, None].cos(), twice(b)[:, None].sin()
        return x * cos + rotate_half(x) * sin

    ran = run(PASS, program(forward), X, randn(2, 5, 4), randn(1, 5, 4))
    ran.refuses("the two tables differ in shape")


def test_what_only_looks_like_it_stays() -> None:
    def forward(m, x, y, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        first, second = x[..., :4], x[..., 4:]
        return (
            x * cos + rotate_neighbours(x) * sin,
            x * cos + torch.cat((second, -first), dim=-1) * sin,
            x * cos + torch.cat((second, first), dim=-1) * sin,
            x * cos + torch.cat((-first, second), dim=-1) * sin,
            x * cos + rotate_half(y) * sin,
            x * cos - rotate_half(x) * sin,
            torch.add(x * cos, rotate_half(x) * sin, alpha=2),
            (x + cos) * (rotate_half(x) + sin),
            x * cos + torch.cat((-x[..., 4:], y[..., :4]), dim=-1) * sin,
            x * cos + torch.cat((-x[..., 4::2], x[..., 4:6], x[..., :4]), dim=-1) * sin,
        )

    run(PASS, program(forward), X, randn(2, 3, 5, 8, seed=1), torch.arange(5)[None]).stays()


def test_dynamic_sizes() -> None:
    def forward(m, q, k):
        cos, sin = tables(torch.arange(q.shape[2])[None])
        return apply_rotary_pos_emb(q, k, cos, sin)

    names = {"q": {0: "batch", 2: "seq"}, "k": {0: "batch", 2: "seq"}}
    ran = run([*FOLDED, *AFTER], program(forward), X, randn(2, 2, 5, 8), dynamic=names)
    ran.counts(rope=2, cos=1, sin=1, cat=0)
    ran.agrees(randn(3, 3, 2, 8), randn(3, 2, 2, 8)).agrees(randn(1, 3, 9, 8), randn(1, 2, 9, 8))


def test_dynamic_positions() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        return x * cos + rotate_half(x) * sin

    names = {"x": {0: "batch", 2: "seq"}, "positions": {0: "batch", 1: "seq"}}
    ran = run([remove_noops.PASS, PASS], program(forward), X, torch.arange(10).reshape(2, 5), dynamic=names)
    assert ropes(ran) == 1
    ran.agrees(randn(3, 3, 2, 8), torch.arange(6).reshape(3, 2))
