from __future__ import annotations

import torch
from torch import nn

from graphopt.passes.prune_two_of_four import PASS, two_of_four
from tests._models import randn, randomised
from tests.passes._harness import program, text
from tests.passes._lossy import agrees, lossy

X = randn(2, 5, 8)


def forward(m, x):
    return m.down(m.up(x).relu())


def mlp() -> nn.Module:
    return randomised(program(forward, up=nn.Linear(8, 12), down=nn.Linear(12, 6, bias=False)))


def test_two_of_each_four_are_left() -> None:
    model = mlp()
    graph = lossy(PASS, model, X)
    assert text(graph).splitlines() == [
        "%0 = linear(x, <2 of 4: up.weight>, up.bias)",
        "%1 = relu(%0)",
        "%2 = linear(%1, <2 of 4: down.weight>)",
        "return %2",
    ]
    with torch.no_grad():
        for layer in (model.up, model.down):
            for row in layer.weight:
                for start in range(0, len(row), 4):
                    four = row[start : start + 4]
                    four[four.abs() < four.abs().sort().values[2]] = 0
    agrees(graph, model, X)


def test_the_larger_ones_are_left() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0, 0.0, 0.0, -1.0]])
    assert two_of_four(weight).tolist() == [[0, -4, 0, 3, 0, 0, 0, -1]]


def test_the_least_damage_comes_first() -> None:
    model = mlp()
    with torch.no_grad():
        model.down.weight[:, ::2] *= 1e-3
    graph = lossy(PASS, model, X, rounds=0)
    first, second = PASS.matches(graph)
    assert first["damage"] < second["damage"]
    assert first["w"].target.endswith("down_weight") or "down" in str(
        graph.constants[first["w"].target].sources
    )


def test_a_sparse_weight_is_not_matched_again() -> None:
    graph = lossy(PASS, mlp(), X)
    assert not list(PASS.matches(graph))


def test_rows_that_do_not_divide_are_refused() -> None:
    model = randomised(program(lambda m, x: m.up(x), up=nn.Linear(6, 4)))
    graph = lossy(PASS, model, randn(2, 6))
    (match,) = PASS.matches(graph)
    assert PASS.check(match) == "rows of 6 do not divide into fours"


def test_dynamic_sizes() -> None:
    model = mlp()
    graph = lossy(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}})
    with torch.no_grad():
        model.up.weight.copy_(two_of_four(model.up.weight))
        model.down.weight.copy_(two_of_four(model.down.weight))
    agrees(graph, model, randn(3, 4, 8))
