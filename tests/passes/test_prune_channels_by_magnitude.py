from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.lossy import Budget, LossyManager
from graphopt.compiler.remarks import Remarks
from graphopt.passes.prune_channels_by_magnitude import PASS
from tests._models import randn, randomised
from tests.passes._harness import program, text
from tests.passes._lossy import agrees, lossy

X = randn(2, 5, 8)


def mlp(channels: int = 16) -> nn.Module:
    def forward(m, x):
        return m.down(F.gelu(m.up(x)))

    return randomised(program(forward, up=nn.Linear(8, channels), down=nn.Linear(channels, 6)))


def masked(model: nn.Module, count: int) -> list[int]:
    """Zero the columns of the channels with the smallest weights, each layer's norm counted as one."""
    with torch.no_grad():
        rows, columns = model.up.weight.double().square().sum(1), model.down.weight.double().square().sum(0)
        gone = (rows / rows.sum() + columns / columns.sum()).argsort()[:count].tolist()
        model.down.weight[:, gone] = 0
    return gone


def test_an_eighth_of_the_channels_goes() -> None:
    model = mlp()
    graph = lossy(PASS, model, X)
    assert text(graph).splitlines() == [
        "%0 = linear(x, <14 of 16 units: up.weight>, <14 of 16 units: up.bias>)",
        "%1 = gelu(%0)",
        "%2 = linear(%1, <14 of 16 units: down.weight>, down.bias)",
        "return %2",
    ]
    masked(model, 2)
    agrees(graph, model, X)


def test_more_rounds_take_more_down_to_one_channel() -> None:
    graph = lossy(PASS, mlp(), X, rounds=30)
    shapes = [tuple(node.args[1].meta["val"].shape) for node in graph.calls if "linear" in str(node.target)]
    assert shapes == [(1, 8), (6, 1)]
    assert not list(PASS.matches(graph))


def test_the_least_damage_comes_first() -> None:
    def forward(m, x):
        return m.two(F.relu(m.one(x))) + m.four(F.relu(m.three(x)))

    layers = {name: nn.Linear(8, 8) for name in ("one", "two", "three", "four")}
    model = randomised(program(forward, **layers))
    with torch.no_grad():
        model.three.weight[3] *= 1e-3
        model.four.weight[:, 3] *= 1e-3
    first, second = PASS.matches(lossy(PASS, model, X, rounds=0))
    assert first["damage"] < second["damage"]
    assert first["kept"] == [0, 1, 2, 4, 5, 6, 7]
    assert set(first["group"].made).isdisjoint(second["group"].made)


def test_convolutions_with_depthwise_filters_between() -> None:
    def forward(m, x):
        return m.two(F.relu(m.deep(F.relu(m.one(x)))))

    layers = {
        "one": nn.Conv2d(3, 8, 3),
        "deep": nn.Conv2d(8, 8, 3, groups=8),
        "two": nn.Conv2d(8, 4, 1),
    }
    model, image = randomised(program(forward, **layers)), randn(2, 3, 8, 8)
    graph = lossy(PASS, model, image)
    with torch.no_grad():
        rows = model.one.weight.double().square().sum((1, 2, 3))
        columns = model.two.weight.double().square().sum((0, 2, 3))
        model.two.weight[:, (rows / rows.sum() + columns / columns.sum()).argmin()] = 0
    agrees(graph, model, image)


def test_channels_that_are_needed_stay() -> None:
    def forward(m, x):
        return m.down(F.layer_norm(m.up(x), (16,)))

    model = randomised(program(forward, up=nn.Linear(8, 16), down=nn.Linear(16, 6)))
    assert not list(PASS.matches(lossy(PASS, model, X)))


def test_dynamic_sizes() -> None:
    model = mlp()
    graph = lossy(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}})
    masked(model, 2)
    agrees(graph, model, randn(3, 4, 8))


def test_smaller_steps_follow_for_when_the_loss_is_too_much() -> None:
    matches = list(PASS.matches(lossy(PASS, mlp(32), X, rounds=0)))
    assert [match["step"] for match in matches] == [4, 2, 1]
    assert [len(match["kept"]) for match in matches] == [28, 30, 31]
    damages = [match["damage"] for match in matches]
    assert damages == sorted(damages, reverse=True)


def test_what_an_eighth_loses_too_much_of_is_tried_in_halves() -> None:
    """Three channels of 32 add next to nothing: an eighth is one too many, two and one fit."""
    model = mlp(32)
    with torch.no_grad():
        for layer, dim in ((model.up.weight, 0), (model.up.bias, 0), (model.down.weight, 1)):
            layer.transpose(0, dim)[[3, 9, 20]] *= 1e-4
    graph = capture(model, (X,), {})
    outcome, loss = LossyManager([PASS], Remarks(), Budget(1e-5)).run(graph, [X])
    assert [row.kept for row in outcome.rewrites][:2] == [False, True]
    assert sum(row.kept for row in outcome.rewrites) == 2
    assert loss <= 1e-5
    (up, down) = (node for node in graph.calls if node.target is torch.ops.aten.linear.default)
    assert up.args[1].meta["val"].shape == (29, 8)
    assert down.args[1].meta["val"].shape == (6, 29)
