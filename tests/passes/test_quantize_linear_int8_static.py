from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler import cpu
from graphopt.compiler.calibration import Range
from graphopt.compiler.lossy import relative_distance
from graphopt.kernels.gated_mlp import OP as GATED_MLP
from graphopt.passes import fuse_linear_activation
from graphopt.passes.quantize_linear_int8_static import PASS, balance
from tests._models import randn
from tests.passes._harness import program, results, run, text
from tests.passes._quantizing import calibrate, calibrated, projection, refusal, rewritten

X = randn(3, 50, 64)


def distance(model: nn.Module, graph: Any, x: torch.Tensor = X) -> float:
    with torch.no_grad():
        return relative_distance([model(x)], results(graph, [x]))


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection(bias: bool) -> None:
    model = projection(bias=bias)
    graph = rewritten(PASS, calibrated(model, X))
    assert (
        text(graph)
        .splitlines()[0]
        .startswith(
            "%0 = graphopt.static_quantized_linear(x, <in int8: layer.weight>, <a scale a row: layer.weight>,"
            " <steps of the input: layer.weight>, 1"
        )
    )
    assert ("layer.bias" in text(graph)) == bias
    assert list(PASS.matches(graph)) == []
    assert 0 < distance(model, graph) < 0.015


def test_features_of_very_different_sizes_lose_no_more() -> None:
    """One step for all of x would round the small features away."""
    model: Any = projection()
    sizes = torch.logspace(-3, 3, 64)
    with torch.no_grad():
        model.layer.weight /= sizes
    x = X * sizes
    assert distance(model, rewritten(PASS, calibrated(model, x)), x) < 0.015


def test_positive_inputs_use_all_codes() -> None:
    """As behind a GELU; a range that is the same on both sides would waste half of them."""
    model, x = projection(), X.relu()
    graph = rewritten(PASS, calibrated(model, x))
    assert ", 0, layer.bias)" in text(graph)
    assert distance(model, graph, x) < 0.01


def test_ranges_are_those_of_all_calls() -> None:
    model = projection()
    narrow, wide = calibrated(model, X), calibrated(model, X, more=(5 * X,))
    assert distance(model, rewritten(PASS, narrow), 5 * X) > 0.3  # beyond the range all is cut off
    assert distance(model, rewritten(PASS, wide), 5 * X) < 0.015


@pytest.mark.parametrize(("vnni", "largest"), [(True, 127), (False, 63)])
def test_sums_of_pairs_do_not_saturate_without_vnni(
    vnni: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "features", lambda: cpu.Features(False, False, vnni, False))
    graph = rewritten(PASS, calibrated(projection(), X))
    (codes,) = (c.tensor for c in graph.constants.values() if c.how == "in int8")
    assert codes.abs().amax(1).tolist() == [largest] * 80
    assert vnni or 2 * 255 * int(codes.abs().max()) < 2**15


def test_an_activation_goes_along() -> None:
    model = program(lambda m, x: F.gelu(m.layer(x)), layer=nn.Linear(64, 80))
    fused = run(fuse_linear_activation.PASS, model, X).graph
    graph = rewritten(PASS, calibrate(fused, [[X]]))
    assert "activation=gelu" in text(graph)
    assert 0 < distance(model, graph) < 0.02


def test_a_gated_block_quantizes_its_input_once() -> None:
    model = program(
        lambda m, x: GATED_MLP.overload(x, m.gate, m.up), gate=randn(80, 64) / 8, up=randn(80, 64, seed=1) / 8
    )
    graph = rewritten(PASS, calibrated(model, X))
    factors = {node.args[3] for node in graph.calls if "static" in str(node.target)}
    assert len(factors) == 1
    assert graph.op_counts() == {"graphopt.static_quantized_linear": 2, "aten.mul": 1}
    assert distance(model, graph) < 0.03


def test_balance_is_shared_between_input_and_weight() -> None:
    weight = randn(5, 4)
    weight[:, 3] = 0
    x = Range(torch.tensor([-4.0, 0.0, -1.0, -3.0]), torch.tensor([1.0, 0.0, 9.0, 2.0]))
    sizes = balance(x, weight)
    assert sizes[1] == sizes[3] == 1  # nothing comes in, or nothing of it goes out
    largest = weight.abs().amax(0)
    torch.testing.assert_close(sizes[0] / sizes[2], (4 / 9) ** 0.75 * (largest[2] / largest[0]) ** 0.25)


def test_nothing_observed_is_refused() -> None:
    assert refusal(PASS, capture(projection(), (X,), {})) == "nobody has observed the range of its input"


@pytest.mark.parametrize("number", [0.0, torch.inf])
def test_a_range_without_steps_is_refused(number: float) -> None:
    graph = calibrated(projection(), torch.full((3, 64), number))
    assert refusal(PASS, graph) == "the range of its input is not finite, or 0 alone"


def test_few_weights_are_refused() -> None:
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(8, 8))
    assert "64 weights are too few" in str(refusal(PASS, calibrated(model, randn(2, 8))))
