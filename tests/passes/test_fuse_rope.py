from __future__ import annotations

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as apply_to_neighbours
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
        %0 = transpose(x, 1, 2)
        %1 = cos(angles)
        %2 = mul(%1, 2)
        %3 = sin(angles)
        %4 = graphopt.rope(%0, %2, %3)
        %5 = transpose(%4, 1, 2)
        return %5
    """)


def halves(x, c, s):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * c - second * s, c * second + s * first], dim=-1)


def sliced(x, c, s):
    first, second = x[..., :4], x[..., 4:]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def of_two_rows(x, c, s):
    first, second = x.reshape(*x.shape[:-1], 2, 4).unbind(-2)
    return torch.stack([first * c - second * s, first * s + second * c], dim=-2).flatten(-2)


def rolled(x, c, s):
    rolled = x.roll(4, dims=-1)
    return x * twice(c) + torch.cat([-rolled[..., :4], rolled[..., 4:]], dim=-1) * twice(s)


def neighbours(x, c, s):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * c - second * s, first * s + second * c], dim=-1).flatten(-2)


def pairs(x, c, s):
    first, second = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([first * c - second * s, first * s + second * c], dim=-1).reshape(x.shape).type_as(x)


def columns(x, c, s):
    pair = x.reshape(*x.shape[:-1], 4, 2)
    first, second = pair[..., 0], pair[..., 1]
    turned = [(first * c - second * s)[..., None], (second * c + first * s).unsqueeze(-1)]
    return torch.cat(turned, dim=-1).reshape(x.shape)


def repeated(x, c, s):
    rotated = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
    return x * c.repeat_interleave(2, dim=-1) + rotated * s.repeat_interleave(2, dim=-1)


def stacked(x, c, s):
    c, s = torch.stack([c, c], -1).flatten(-2), torch.stack((s, s), dim=-1).reshape(*s.shape[:-1], 8)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * s + c * x


def complex_numbers(x, c, s):
    pair = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pair * torch.complex(c.float(), s.float())).flatten(-2).type_as(x)


def polar(x, c, s):
    pair = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    angles = torch.polar(c.abs() + 1, s).unsqueeze(-2).squeeze(-2)
    return torch.view_as_real(pair * angles).flatten(-2).type_as(x)


def partly(x, c, s):
    turning, passing = x[..., :4], x[..., 4:]
    return torch.cat(
        [turning * twice(c[..., :2]) + rotate_half(turning) * twice(s[..., :2]), passing], dim=-1
    )


def partly_neighbours(x, c, s):
    turned = repeated(x[..., :4], c[..., :2], s[..., :2])
    return torch.cat([turned, x[..., 4:]], dim=-1)


def widened(x, c, s):
    wide = x.float()
    return (wide * twice(c).float() + rotate_half(wide) * twice(s).float()).to(x.dtype)


HALVES = [halves, sliced, of_two_rows, rolled, partly, widened]
NEIGHBOURS = [neighbours, pairs, columns, repeated, stacked, complex_numbers, polar, partly_neighbours]
C, S = tables(torch.arange(5), width=8)[0][:, :4], tables(torch.arange(5), width=8)[1][:, :4]
LAYOUTS = {
    "heads first": (X, C, S),
    "tokens first": (randn(2, 5, 3, 8), C[:, None], S[:, None]),
    "a table a sequence": (X, C.expand(2, 1, 5, 4).contiguous(), S.expand(2, 1, 5, 4).contiguous()),
    "one head": (randn(2, 5, 8), C, S),
    "packed sequences": (randn(5, 3, 8), C[:, None], S[:, None]),
    "one token": (randn(2, 3, 1, 8), C[1:2], S[1:2]),
    "one sequence of one head": (randn(5, 8), C, S),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spelling(layout: str) -> None:
    def forward(m, x, c, s):
        return [function(x, c, s) for function in (*HALVES, *NEIGHBOURS)]

    ran = run([PASS, remove_noops.PASS], program(forward), *LAYOUTS[layout])
    assert ropes(ran) == len(HALVES) + len(NEIGHBOURS)
    interleaved = [node.args[3:] == (True,) for node in ran.graph.calls if node.target is ROPE.overload]
    assert sorted(interleaved) == [False] * len(HALVES) + [True] * len(NEIGHBOURS)
    ran.counts(cat=0, stack=0)


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_every_spelling_in_half_precision(table: torch.dtype) -> None:
    def forward(m, x, c, s):
        spellings = [f for f in (*HALVES, *NEIGHBOURS) if f is not polar]  # which has no bfloat16
        return [function(x, c, s).to(x.dtype) for function in spellings]

    ran = run([PASS, remove_noops.PASS], program(forward), X.bfloat16(), C.to(table), S.to(table))
    assert ropes(ran) == len(HALVES) + len(NEIGHBOURS) - 1


SIGNS = torch.tensor([-1.0] * 4 + [1.0] * 4)
SIGNED = {
    "flipped halves": lambda x, c, s, m: (
        x * c + x.view(2, 3, 5, 2, 4).flip(-2).reshape(x.shape) * m.signs * s
    ),
    "signs of the rows": lambda x, c, s, m: (
        x * c + (x.view(2, 3, 5, 2, 4).flip(3) * m.column).reshape(x.shape) * s
    ),
    "rolled": lambda x, c, s, m: s * (m.signs * x.roll(4, -1)) + c * x,
    "in another order": lambda x, c, s, m: x * c + x[..., m.order] * m.signs * s,
    "selected": lambda x, c, s, m: x * c + x.index_select(-1, m.order) * m.whole * s,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_that_are_constants(dtype: torch.dtype) -> None:
    def forward(m, x, angles):
        cos, sin = twice(angles).cos(), twice(angles).sin()
        return [spelled(x, cos, sin, m) for spelled in SIGNED.values()]

    model = program(forward, order=torch.arange(8).roll(4), whole=SIGNS.long())
    for name, signs in (("signs", SIGNS), ("column", torch.tensor([[-1.0], [1.0]]))):
        model.register_buffer(name, signs.to(dtype))
    ran = run(PASS, model, X.to(dtype), randn(5, 4).to(dtype), redraw=False)
    assert ropes(ran) == len(SIGNED)


def test_signs_that_do_not_alternate_are_refused() -> None:
    def forward(m, x, angles):
        cos, sin = twice(angles).cos(), twice(angles).sin()
        return x * cos + x.roll(4, -1) * m.signs * sin

    model = program(forward)
    model.register_buffer("signs", SIGNS.roll(2))
    run(PASS, model, X, randn(5, 4), redraw=False).refuses("the two features of a pair do not turn together")


def test_factors_and_orders_that_are_none_stay() -> None:
    def forward(m, x, angles, order):
        cos, sin = twice(angles).cos(), twice(angles).sin()
        turned = x.roll(4, -1)
        return (
            x * cos + turned * m.factors * sin,
            x * cos + x[..., order] * sin,
            x * cos + x[:, :, m.rows] * sin,
        )

    model = program(forward, rows=torch.tensor([0, 2, 1, 4, 3]))
    model.register_buffer("factors", 2 * SIGNS)
    run(PASS, model, X, randn(5, 4), torch.arange(8).roll(4), redraw=False).stays()


def test_dynamic_sizes_and_signs() -> None:
    def forward(m, x, angles):
        return x * twice(angles).cos() + x.roll(4, -1) * m.signs * twice(angles).sin()

    model = program(forward)
    model.register_buffer("signs", SIGNS)
    dynamic = {"x": {0: "batch", 2: "seq"}, "angles": {0: "seq"}}
    ran = run(PASS, model, X, randn(5, 4), dynamic=dynamic, redraw=False)
    assert ropes(ran) == 1
    ran.agrees(randn(3, 3, 7, 8), randn(7, 4))


def test_the_table_of_complex_numbers_of_llama() -> None:
    def forward(m, x):
        pair = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pair * m.table[:5].view(1, 5, 1, 4)).flatten(3).type_as(x)

    model = program(forward, table=torch.polar(torch.ones(9, 4), randn(9, 4)))
    ran = run([*FOLDED, *AFTER], model, randn(2, 5, 3, 8))
    ran.counts(rope=1, view_as_real=0, select=0, slice=0, reshape=0)


def test_neighbours_of_part_of_the_features() -> None:
    def forward(m, q, k, positions):
        angles = positions[..., None] * 100.0 ** -torch.linspace(0, 1, 4)
        return apply_to_neighbours(q, k, twice(angles).cos(), twice(angles).sin())

    ran = run(PASS, program(forward), randn(2, 3, 5, 12), randn(2, 1, 5, 12), torch.arange(5)[None])
    ran.counts(rope=2, cat=0, stack=0, slice=0)


def test_tokens_first_with_the_tables_of_transformers() -> None:
    def forward(m, q, k, positions):
        cos, sin = tables(positions)
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)

    ran = run(PASS, program(forward), randn(2, 5, 3, 8), randn(2, 5, 1, 8), torch.arange(5)[None])
    ran.counts(rope=2, cat=0, slice=0, transpose=0)


def test_a_table_that_is_looked_up() -> None:
    def forward(m, x, ids):
        cos, sin = m.cos[ids].unsqueeze(1), m.sin[ids].unsqueeze(1)
        return x * cos + rotate_half(x) * sin

    model = program(forward)
    for name, table in zip(("cos", "sin"), tables(torch.arange(9)), strict=True):
        model.register_buffer(name, table)
    ran = run(PASS, model, X, torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]))
    ran.counts(rope=1, cat=0, index=2)


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

    run(PASS, program(forward), X, torch.arange(5)[None]).counts(rope=1, cat=0, slice=0)


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


def test_backwards() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        return x * cos - rotate_half(x) * sin

    run(PASS, program(forward), X, torch.arange(5)[None]).counts(
        rope=1, neg=2, cat=0
    )  # of an exponent; of the sine


def test_a_table_that_is_broadcast_is_refused() -> None:
    def forward(m, x, c, s):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    ran = run(PASS, program(forward), X, C[:1], S[:1])
    ran.refuses(r"the cos table has shape \[1, 4\], which does not fit \[2, 3, 5, 8\]")


def test_a_table_a_head_is_refused() -> None:
    def forward(m, x, c, s):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    ran = run(PASS, program(forward), X, randn(3, 5, 4), randn(3, 5, 4, seed=1))
    ran.refuses(r"the cos table has shape \[3, 5, 4\], which does not fit \[2, 3, 5, 8\]")


def test_a_table_of_another_type() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        return x * cos + rotate_half(x) * sin

    run(PASS, program(forward), X.bfloat16(), torch.arange(5)[None]).counts(rope=1, to=1, cat=0)


def test_a_table_of_more_bits_is_refused() -> None:
    def forward(m, x, c, s):
        return halves(x, c, s).to(x.dtype)

    run(PASS, program(forward), X, C.double(), S.double()).refuses("the cos table is torch.float64, not")


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


def test_neighbours_with_the_angles_of_halves_are_refused() -> None:
    def forward(m, x, positions):
        cos, sin = (table[:, None] for table in tables(positions))
        return x * cos + rotate_neighbours(x) * sin

    ran = run(PASS, program(forward), X, torch.arange(5)[None])
    ran.refuses("the cos table is not known to hold each angle twice")


def test_features_that_do_not_turn_together_are_refused() -> None:
    def forward(m, x, c, s):
        return x * twice(c) + torch.cat((x[..., 4:], x[..., :4]), dim=-1) * twice(s)

    run(PASS, program(forward), X, C, S).refuses("the two features of a pair do not turn together")


def test_features_in_another_order_are_refused() -> None:
    def forward(m, x, c, s):
        return x * twice(c) + x.flip(-1) * twice(s)

    ran = run(PASS, program(forward), X, C, S)
    ran.refuses("the features are paired neither with their neighbours nor by halves")


def test_what_only_looks_like_it_stays() -> None:
    def forward(m, x, y, c, s):
        cos, sin = twice(c), twice(s)
        return (
            x * cos + rotate_half(y) * sin,
            torch.add(x * cos, rotate_half(x) * sin, alpha=2),
            (x + cos) * (rotate_half(x) + sin),
            x * cos + torch.cat((-x[..., 4:], y[..., :4]), dim=-1) * sin,
            x * cos + y * sin,
            x * cos + x * sin,
            x * cos + rotate_half(x) * sin * sin,
        )

    ran = run(PASS, program(forward), X, randn(2, 3, 5, 8, seed=1), C, S).stays()
    assert not ran.remarks.of_kind("missed")


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
