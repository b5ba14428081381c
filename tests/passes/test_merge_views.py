from __future__ import annotations

import random

import torch

from graphopt.passes.merge_views import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)
DYNAMIC = {"x": {0: "batch", 1: "seq"}}

NOTHING = {
    "there and back": lambda x: x.reshape(10, 8).view(2, 5, 8),
    "unsqueezed and squeezed": lambda x: x.unsqueeze(1).squeeze(1),
    "squeezed wherever": lambda x: x[None].squeeze(),
    "squeezed twice": lambda x: x[None, :, :, None].squeeze((0, 3)),
    "flattened and unflattened": lambda x: x.flatten(1).unflatten(-1, (5, 8)),
    "through a vector": lambda x: x.ravel().reshape(-1, 8).reshape_as(x),
    "through sizes that share no factor": lambda x: x.reshape(16, 5).reshape(5, 16).reshape(2, 5, 8),
    "permuted in parts": lambda x: x.transpose(0, 1).reshape(5, 2, 2, 4).permute(1, 0, 2, 3).flatten(2),
    "selected where there is one": lambda x: x.unsqueeze(1)[:, 0],
}
ONE = {
    "reshaped twice": lambda x: x.reshape(10, 8).reshape(5, 16),
    "with -1": lambda x: x.flatten().view(5, -1),
    "unflattened, flattened": lambda x: x.unflatten(2, (2, 4)).flatten(0, 1),
    "three": lambda x: x.unsqueeze(0).flatten(0, 1).unsqueeze(2),
    "two unsqueezes": lambda x: x[:, None, :, None],
    "transposed where there is one": lambda x: x.unsqueeze(0).transpose(0, 1),
}


def each(functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return [function(x).sin() for function in functions.values()]

    return program(forward)


def test_what_comes_back_goes() -> None:
    ran = run(PASS, each(NOTHING), X)
    assert {node.args for node in ran.graph.calls} == {(ran.graph.placeholders[0],)}


def test_a_chain_of_reshapes_is_one() -> None:
    ran = run(PASS, each(ONE), X).counts(reshape=len(ONE), sin=len(ONE))
    ran.counts(unsqueeze=0, transpose=0)


def test_what_becomes_of_the_graph() -> None:
    def forward(m, x):
        return x.reshape(2, 5, 2, 4).unsqueeze(1).flatten(2, 3)

    run(PASS, program(forward), X).becomes(
        "%0 = reshape(x, [2, 1, 10, 4])\nreturn %0",
        before="""
            %0 = reshape(x, [2, 5, 2, 4])
            %1 = unsqueeze(%0, 1)
            %2 = reshape(%1, [2, 1, 10, 4])
            return %2
        """,
    )


def test_heads_of_joined_batch_and_heads() -> None:
    """As torch.nn.MultiheadAttention takes its packed projection apart."""

    def forward(m, x):
        parts = x.unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        return [parts[i].reshape(5, 4, 4).transpose(0, 1).reshape(2, 2, 5, 4).sin() for i in range(3)]

    run(PASS, program(forward), randn(5, 2, 24)).becomes("""
        %0 = reshape(x, [5, 2, 3, 2, 4])
        %1 = select(%0, 2, 2)
        %2 = permute(%1, [1, 2, 0, 3])
        %3 = reshape(x, [5, 2, 3, 2, 4])
        %4 = select(%3, 2, 1)
        %5 = permute(%4, [1, 2, 0, 3])
        %6 = reshape(x, [5, 2, 3, 2, 4])
        %7 = select(%6, 2, 0)
        %8 = permute(%7, [1, 2, 0, 3])
        %9 = sin(%8)
        %10 = sin(%5)
        %11 = sin(%2)
        return %9, %10, %11
    """)


def test_an_index_of_joined_dimensions_is_one_of_each() -> None:
    def forward(m, x):
        return x.transpose(0, 1).flatten(1)[:, 11].sin(), x.transpose(0, 1).reshape(5, 16)[:, -1].sin()

    run(PASS, program(forward), X).becomes("""
        %0 = select(x, 2, 3)
        %1 = select(%0, 0, 1)
        %2 = sin(%1)
        %3 = select(x, 2, 7)
        %4 = select(%3, 0, 1)
        %5 = sin(%4)
        return %2, %5
    """)


def test_sizes_that_share_no_factor_part_a_chain() -> None:
    def forward(m, x):
        return x.transpose(0, 1).reshape(4, 20).unsqueeze(0).transpose(0, 1).squeeze(1)

    run(PASS, program(forward), X).becomes("""
        %0 = transpose(x, 0, 1)
        %1 = reshape(%0, [4, 20])
        return %1
    """)


def test_inner_ones_that_others_read_stay() -> None:
    def forward(m, x):
        y = x.reshape(10, 8)
        return y, y.reshape(5, 16).sin(), y.reshape(2, 5, 8).sin()

    run(PASS, program(forward), X).becomes("""
        %0 = reshape(x, [10, 8])
        %1 = reshape(x, [5, 16])
        %2 = sin(%1)
        %3 = sin(x)
        return %0, %2, %3
    """)


def test_a_copy_that_several_read_is_made_once() -> None:
    def forward(m, x):
        rows = x.transpose(0, 1).reshape(10, 8)
        return rows.reshape(20, 4).sin(), rows.reshape(40, 2).sin()

    run(PASS, program(forward), X).stays()


def test_what_is_as_short_as_can_be_stays() -> None:
    def forward(m, x):
        return (
            x.reshape(10, 8),
            x.unsqueeze(0),
            x.reshape(10, 8).t().reshape(2, 40),
            x.reshape(2, 5, 2, 4).permute(0, 2, 1, 3).reshape(4, 5, 4),
            x.reshape(2, 5, 2, 4)[:, :, 1],
            x[0].expand(3, 5, 8).transpose(0, 1),
        )

    run(PASS, program(forward), X).stays()


def test_an_empty_value_stays() -> None:
    def forward(m, x):
        return x.reshape(5, 0).unsqueeze(0).reshape(0, 2).sin()

    run(PASS, program(forward), randn(5, 0)).stays()


def _drawn(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """A chain of views of at least two dimensions."""
    for _ in range(rng.randint(2, 7)):
        kind, rank = rng.choice(("permute", "split", "join", "one", "select")), x.dim()
        if kind == "permute":
            x = x.permute(rng.sample(range(rank), rank))
        elif kind == "split":
            dim = rng.randrange(rank)
            parts = [n for n in range(1, x.shape[dim] + 1) if x.shape[dim] % n == 0]
            x = x.unflatten(dim, (rng.choice(parts), -1))
        elif kind == "join" and rank > 2:
            dim = rng.randrange(rank - 1)
            x = x.flatten(dim, dim + 1)
        elif kind == "one":
            x = x.unsqueeze(rng.randrange(rank + 1))
        elif rank > 2:
            dim = rng.randrange(rank)
            x = x.select(dim, rng.randrange(-x.shape[dim], x.shape[dim]))
    return x


def test_whatever_the_chain() -> None:
    """The harness compares what it computes; here, that no chain has two views of a kind side by side."""

    def forward(m, x):
        rng = random.Random(7)
        return [_drawn(rng, x).sin() for _ in range(60)]

    ran = run(PASS, program(forward), randn(6, 4, 10))
    reshape, permutes = torch.ops.aten.reshape.default, ("permute", "transpose")
    for node in ran.graph.calls:
        chain = []
        while node.op == "call_function" and node.target is not torch.ops.aten.sin.default:
            chain.append(node)
            node = node.args[0]
        assert sum(view.target is reshape for view in chain) <= 2, chain
        assert sum(any(kind in str(view.target) for kind in permutes) for view in chain) <= 1, chain
    assert len(ran.graph.calls) < 0.75 * len(ran.captured.calls)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        batch, seq, _ = x.shape
        return (
            x.reshape(-1, 8).reshape(batch, seq, 2, 4).sin(),
            x.reshape(batch * seq, 8).reshape(batch, seq, 8).sin(),
            x.reshape(-1, 2, 4).unsqueeze(1).sin(),
            x.unsqueeze(1).unsqueeze(-1).sin(),
            x.unsqueeze(0).squeeze(0).sin(),
            x.unsqueeze(2).flatten(0, 1).unsqueeze(-1).sin(),
        )

    ran = run(PASS, program(forward), X, dynamic=DYNAMIC).counts(reshape=4, unsqueeze=0, squeeze=0)
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 9, 8))


def test_dynamic_sizes_permuted() -> None:
    def forward(m, x):
        batch, seq, _ = x.shape
        heads = x.transpose(0, 1).reshape(seq, batch * 2, 4).transpose(0, 1).view(batch, 2, seq, 4)
        back = heads.permute(2, 0, 1, 3).reshape(seq * batch, 8).view(seq, batch, 8).transpose(0, 1)
        return heads.sin(), back.cos()

    ran = run(PASS, program(forward), X, dynamic=DYNAMIC).counts(reshape=1, permute=0, transpose=1)
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 9, 8))


def test_two_sizes_that_nobody_says_are_refused() -> None:
    def forward(m, x):
        doubled = torch.cat([x, x], 1)
        return doubled.reshape(-1, x.shape[1], 8).unsqueeze(1).relu(), doubled

    def told(m, x):
        doubled = torch.cat([x, x], 1)
        return doubled.reshape(2 * x.shape[0], x.shape[1], 8).unsqueeze(1)

    run(PASS, program(told), X, dynamic=DYNAMIC).counts(reshape=1, unsqueeze=0).agrees(randn(3, 4, 8))
    run(PASS, program(forward), X, dynamic=DYNAMIC).counts(reshape=1, unsqueeze=0).agrees(randn(3, 4, 8))
