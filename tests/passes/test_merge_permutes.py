from __future__ import annotations

import torch

from graphopt.passes.merge_permutes import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)

SPELLINGS = {
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0, 2),
    "negative dimensions": lambda x: x.permute(-2, -3, -1),
    "movedim": lambda x: x.movedim(0, 1),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "twice": lambda x: x.permute(1, 2, 0).transpose(1, 2),
    "three times": lambda x: x.transpose(0, 2).transpose(0, 1).transpose(1, 2).permute(0, 1, 2),
}
NOTHING = {
    "permuted back": lambda x: x.permute(1, 2, 0).permute(2, 0, 1),
    "identity": lambda x: x.permute(0, 1, -1),
    "transposed to itself": lambda x: x.transpose(1, -2),
    "there and back in three": lambda x: x.mT.movedim(1, 0).permute(1, 2, 0),
}


def each(functions):
    """A program that computes each; several in one, since capturing is what takes the time."""

    def forward(m, x):
        return [function(x).sin() for function in functions.values()]

    return program(forward)


def test_one_spelling_of_a_transpose() -> None:
    ran = run(PASS, each(SPELLINGS), X)
    read = [node.args[0] for node in ran.graph.calls if node.target is torch.ops.aten.sin.default]
    assert [(node.target, node.args[1:]) for node in read] == [(torch.ops.aten.transpose.int, (0, 1))] * len(
        SPELLINGS
    )
    assert {node.args[0] for node in read} == {ran.graph.placeholders[0]}


def test_what_moves_nothing_goes() -> None:
    ran = run(PASS, each(NOTHING), X)
    assert {node.args for node in ran.graph.calls} == {(ran.graph.placeholders[0],)}


def test_a_chain_is_one_permute() -> None:
    def forward(m, x):
        return x.transpose(0, 1).transpose(1, 2)

    run(PASS, program(forward), X).becomes(
        "%0 = permute(x, [1, 2, 0])\nreturn %0",
        before="""
            %0 = transpose(x, 0, 1)
            %1 = transpose(%0, 1, 2)
            return %1
        """,
    )


def test_matrices() -> None:
    def forward(m, x):
        return x.t().sin(), x.T.sin(), x.t().t().sin()

    ran = run(PASS, program(forward), randn(5, 8))
    ran.becomes("""
        %0 = transpose(x, 0, 1)
        %1 = sin(%0)
        %2 = transpose(x, 0, 1)
        %3 = sin(%2)
        %4 = sin(x)
        return %1, %3, %4
    """)


def test_vectors_and_numbers() -> None:
    def forward(m, x, y):
        return x.t().sin(), y.transpose(0, -1).sin()

    run(PASS, program(forward), randn(5), randn(1)[0]).becomes("%0 = sin(x)\n%1 = sin(y)\nreturn %0, %1")


def test_an_inner_one_that_others_read_stays() -> None:
    def forward(m, x):
        y = x.permute(1, 2, 0)
        return y.sin(), y.permute(2, 1, 0).sin()

    run(PASS, program(forward), X).becomes("""
        %0 = permute(x, [1, 2, 0])
        %1 = transpose(x, 1, 2)
        %2 = sin(%0)
        %3 = sin(%1)
        return %2, %3
    """)


def test_one_permutation_stays() -> None:
    def forward(m, x):
        return x.permute(1, 2, 0), x.transpose(0, 1), x.transpose(0, 1).sin().transpose(0, 1)

    run(PASS, program(forward), X).stays()


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return x.permute(1, 2, 0).movedim(0, 1).sin(), x.mT.permute(0, 2, 1).sin()

    ran = run(PASS, program(forward), X, dynamic={"x": {0: "batch", 1: "seq"}})
    ran.counts(permute=0, transpose=1).agrees(randn(3, 4, 8)).agrees(randn(1, 9, 8))
