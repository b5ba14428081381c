from __future__ import annotations

import torch

from graphopt.passes.merge_reshapes import PASS
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
}
ONE = {
    "reshaped twice": lambda x: x.reshape(10, 8).reshape(5, 16),
    "with -1": lambda x: x.flatten().view(5, -1),
    "unflattened, flattened": lambda x: x.unflatten(2, (2, 4)).flatten(0, 1),
    "three": lambda x: x.unsqueeze(0).flatten(0, 1).unsqueeze(2),
    "two unsqueezes": lambda x: x[:, None, :, None],
}


def each(functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return [function(x).sin() for function in functions.values()]

    return program(forward)


def test_what_comes_back_goes() -> None:
    ran = run(PASS, each(NOTHING), X)
    assert {node.args for node in ran.graph.calls} == {(ran.graph.placeholders[0],)}


def test_a_chain_is_one_reshape() -> None:
    run(PASS, each(ONE), X).counts(reshape=len(ONE), unsqueeze=0, sin=len(ONE))


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


def test_a_single_reshape_stays() -> None:
    def forward(m, x):
        return (
            x.reshape(10, 8),
            x.unsqueeze(0),
            x.reshape(10, 8).t().reshape(2, 40),
            x[0, None].transpose(0, 1),
        )

    run(PASS, program(forward), X).stays()


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


def test_two_sizes_that_nobody_says_are_refused() -> None:
    def forward(m, x):
        doubled = torch.cat([x, x], 1)
        return doubled.reshape(2 * x.shape[0], x.shape[1], 8).unsqueeze(1)

    ran = run(PASS, program(forward), X, dynamic=DYNAMIC)
    ran.refuses(r"the sizes of its dimensions \[0, 2\] are not sizes of")
