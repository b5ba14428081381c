"""Pruning by magnitude through ``optimize``: what is nearly redundant goes, within the loss allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.capture.export import capture
from graphopt.compiler.lossy import Budget, LossyManager, relative_distance
from graphopt.compiler.pass_ import find
from graphopt.compiler.remarks import Remarks
from tests._models import Example, bert, randn, randomised
from tests.passes._harness import program, text

CHANNELS, HEADS, SPARSE = "prune_channels_by_magnitude", "prune_heads_by_magnitude", "prune_two_of_four"
FAINT = 1e-3
MAX_LOSS = 0.02
X = randn(6, 8)
IMAGE = randn(2, 3, 9, 9)


def mlp() -> nn.Module:
    """Of 32 channels, the 7 with odd numbers below 14 are faint: an eighth, and an eighth of the rest."""

    def forward(m, x):
        return m.last(F.gelu(m.up(x)))

    model = randomised(program(forward, up=nn.Linear(8, 32), last=nn.Linear(32, 6)))
    faint(model.up, model.last, range(1, 14, 2))
    return model


def cnn() -> nn.Module:
    """Of 16 channels, the first 4 are faint, in front of a filter of each alone."""

    def forward(m, x):
        return m.last(F.relu(m.deep(F.relu(m.norm(m.first(x))))).mean((2, 3)))

    layers = {
        "first": nn.Conv2d(3, 16, 3, bias=False),
        "norm": nn.BatchNorm2d(16),
        "deep": nn.Conv2d(16, 16, 3, groups=16),
        "last": nn.Linear(16, 5),
    }
    model = randomised(program(forward, **layers))
    faint(model.first, model.last, range(4))
    return model


def transformer() -> Example:
    """Of the second layer's 2 heads of 8 features the first is faint, of each block's 32 channels 4."""
    example = bert()
    layers: Any = example.model.encoder.layer
    faint(layers[1].attention.self.value, layers[1].attention.output.dense, range(8))
    for layer in layers:
        faint(layer.intermediate.dense, layer.output.dense, range(4))
    return example


def faint(before: nn.Module, behind: nn.Module, channels: Sequence[int], scale: float = FAINT) -> None:
    """Scale the weights that make channels, and those that read them."""
    with torch.no_grad():
        before.weight[list(channels)] *= scale
        behind.weight[:, list(channels)] *= scale
        if before.bias is not None:
            before.bias[list(channels)] *= scale


def pruned(model: nn.Module, *args: torch.Tensor, enable: Sequence[str], **more: Any) -> Any:
    """The optimized model; nothing is timed."""
    more = {"max_loss": MAX_LOSS, "effort": "fast", "executors": ("eager",), **more}
    return graphopt.optimize(model, args, enable=enable, **more)


def widths(model: Any, *ops: str) -> list[int]:
    """The features that each linear layer makes, or the channels that a convolution makes."""
    rows = [row for row in model.report.graph_after if row.op.split(".")[-1] in ops]
    dim = 1 if "conv2d" in ops else -1
    return [int(row.shape.strip("]").split("[")[1].split(",")[dim]) for row in rows]


def test_channels_of_an_mlp() -> None:
    model = mlp()
    found = pruned(model, X, enable=[CHANNELS])
    assert widths(found, "linear", "linear_activation") == [25, 6]
    assert 0 < found.report.loss <= MAX_LOSS
    assert found.report.rewrites_by_pass()[CHANNELS] == 2
    with torch.no_grad():
        faint(model.up, model.last, range(1, 14, 2), scale=0)  # pruned by hand
        torch.testing.assert_close(found(X), model(X), rtol=1e-5, atol=1e-5)


def test_channels_of_convolutions() -> None:
    model = cnn()
    found = pruned(model, IMAGE, enable=[CHANNELS], disable=["fuse_conv_activation"])
    assert widths(found, "conv2d") == [12, 12]
    assert found.report.loss <= MAX_LOSS
    with torch.no_grad():
        faint(model.first, model.last, range(4), scale=0)
        torch.testing.assert_close(found(IMAGE), model(IMAGE), rtol=1e-5, atol=1e-5)


def test_heads_and_channels_of_a_transformer() -> None:
    example = transformer()
    found = pruned(example.model, enable=[HEADS, CHANNELS], max_loss=1e-4, kwargs=example.kwargs)
    made = found.report.rewrites_by_pass()
    assert (made[HEADS], made[CHANNELS]) == (1, 2)
    assert found.report.loss <= 1e-4
    assert widths(found, "attention") == [8, 8]
    heads = [row.shape.split(", ")[-2] for row in found.report.graph_after if row.op.endswith("attention")]
    assert heads == ["2", "1"]
    assert 28 in widths(found, "linear_activation")
    layers: Any = example.model.encoder.layer
    faint(layers[1].attention.self.value, layers[1].attention.output.dense, range(8), scale=0)
    for layer in layers:
        faint(layer.intermediate.dense, layer.output.dense, range(4), scale=0)
    expected = example().last_hidden_state
    torch.testing.assert_close(found(**example.kwargs).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_two_of_four() -> None:
    model = mlp()
    with torch.no_grad():
        model.up.weight[:, ::2] *= FAINT
    found = pruned(model, X, enable=[SPARSE])
    assert found.report.rewrites_by_pass()[SPARSE] == 1
    assert widths(found, "linear", "linear_activation") == [32, 6]
    with torch.no_grad():
        model.up.weight[:, ::2] = 0
        torch.testing.assert_close(found(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("executor", ["eager", "ort"])
@pytest.mark.parametrize(("make", "example"), [(mlp, X), (cnn, IMAGE)])
def test_executors_agree(make: Any, example: torch.Tensor, executor: str) -> None:
    wanted = pruned(make(), example, enable=[CHANNELS], level=0)(example)
    found = pruned(make(), example, enable=[CHANNELS], executors=(executor,))
    torch.testing.assert_close(found(example), wanted, rtol=1e-5, atol=1e-5)


def test_the_users_metric() -> None:
    """Classes that change; the distance may be what it likes."""

    def changed(original: Sequence[Any], found: Sequence[Any]) -> float:
        return float((original[0].argmax(-1) != found[0].argmax(-1)).double().mean())

    model = mlp()
    found = pruned(model, X, enable=[CHANNELS], max_loss=0.0, metric=changed)
    assert found.report.loss == 0
    assert widths(found, "linear", "linear_activation")[0] <= 25
    with torch.no_grad():
        assert torch.equal(found(X).argmax(-1), model(X).argmax(-1))


def test_levels() -> None:
    """No level runs them unasked; asked for, they run on every level, and alone on level 0."""
    for level in (2, 3):
        found = graphopt.optimize(mlp(), (X,), level=level, effort="fast", executors=("eager",))
        assert found.report.loss is None
        assert widths(found, "linear", "linear_activation") == [32, 6]
    alone = pruned(mlp(), X, enable=[CHANNELS], level=0)
    assert alone.report.rewrites_by_pass() == {CHANNELS: 2}
    assert widths(alone, "linear") == [25, 6]
    none = pruned(mlp(), X, enable=[CHANNELS], disable=[CHANNELS])
    assert widths(none, "linear", "linear_activation") == [32, 6]


def test_nothing_may_be_lost() -> None:
    found = pruned(mlp(), X, enable=[CHANNELS, SPARSE], max_loss=0.0)
    assert found.report.loss == 0
    assert widths(found, "linear", "linear_activation") == [32, 6]
    assert any("above the 0 allowed" in row.reason for row in found.report.remarks)


@pytest.mark.parametrize(("make", "example"), [(mlp, X), (cnn, IMAGE)])
def test_a_second_run_changes_nothing(make: Any, example: torch.Tensor) -> None:
    graph = capture(make(), (example,), {})
    budget = Budget(MAX_LOSS)
    first, loss = LossyManager([find(CHANNELS)], Remarks(), budget).run(graph, [example])
    assert first.kept
    assert loss <= MAX_LOSS
    before = text(graph)
    again, loss = LossyManager([find(CHANNELS)], Remarks(), budget).run(graph, [example])
    assert (again.kept, loss) == ([], 0.0)
    assert text(graph) == before


def test_the_report_says_what_it_cost() -> None:
    model = mlp()
    found = pruned(model, X, enable=[CHANNELS])
    with torch.no_grad():
        assert relative_distance([model(X)], [found(X)]) == pytest.approx(found.report.loss, rel=1e-2)
    kept = [row for row in found.report.rewrites if row.pass_name == CHANNELS and row.kept]
    assert kept[-1].error_after == found.report.loss
    assert all(row.source for row in kept)
