from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler import cpu
from graphopt.compiler.lossy import relative_distance
from graphopt.kernels.conv_activation import OP as CONV_ACTIVATION
from graphopt.passes.quantize_conv_int8 import PASS
from tests._models import randn
from tests.passes._harness import program, results, text
from tests.passes._quantizing import calibrated, refusal, rewritten

X = randn(2, 8, 12, 12)
PLAIN: Any = ([1, 1], [1, 1], [1, 1], 1)


def convolution(**options: Any) -> nn.Module:
    return program(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 16, 3, **options))


def fused(activation: str, residual: bool = False) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return CONV_ACTIVATION.overload(x, m.weight, m.bias, *PLAIN, activation, 1.0, x if residual else None)

    return program(forward, weight=randn(8, 8, 3, 3) / 9, bias=randn(8))


def distance(model: nn.Module, graph: Any, x: torch.Tensor = X) -> float:
    with torch.no_grad():
        return relative_distance([model(x)], results(graph, [x]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"groups": 4},
    ],
    ids=str,
)
def test_a_convolution(options: dict[str, Any]) -> None:
    model = convolution(**options)
    graph = rewritten(PASS, calibrated(model, X))
    assert graph.op_counts() == {"graphopt.quantized_conv": 1}
    assert ("<in int32: conv.bias, conv.weight>" in text(graph)) == options.get("bias", True)
    assert list(PASS.matches(graph)) == []
    assert 0 < distance(model, graph) < 0.02


def test_a_relu_is_a_zero_point_of_zero() -> None:
    model = fused("relu")
    graph = rewritten(PASS, calibrated(model, X))
    (node,) = graph.calls
    assert node.args[-1] == 0
    (found,) = results(graph, [X])
    assert found.min() == 0
    assert distance(model, graph) < 0.02


def test_one_convolution_reads_the_codes_of_another() -> None:
    """Same values, same steps: ONNX Runtime then passes the codes on."""
    model = program(
        lambda m, x: m.two(CONV_ACTIVATION.overload(x, m.weight, None, *PLAIN, "relu")),
        weight=randn(8, 8, 3, 3) / 9,
        two=nn.Conv2d(8, 8, 1),
    )
    graph = rewritten(PASS, calibrated(model, X))
    first, second = graph.calls
    assert first.args[-2:] == second.args[-4:-2]
    assert distance(model, graph) < 0.03


def test_channels_of_very_different_sizes_have_scales_of_their_own() -> None:
    model: Any = convolution(bias=False)
    sizes = torch.logspace(-3, 3, 16)[:, None, None, None]
    with torch.no_grad():
        model.conv.weight *= sizes
    graph = rewritten(PASS, calibrated(model, X))
    (codes,) = (c.tensor for c in graph.constants.values() if c.how == "in int8")
    assert codes.abs().amax((1, 2, 3)).tolist() == [127 if cpu.features().vnni else 63] * 16


@pytest.mark.parametrize(("vnni", "largest"), [(True, 127), (False, 63)])
def test_sums_of_pairs_do_not_saturate_without_vnni(
    vnni: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "features", lambda: cpu.Features(False, False, vnni, False))
    graph = rewritten(PASS, calibrated(convolution(), X))
    (codes,) = (c.tensor for c in graph.constants.values() if c.how == "in int8")
    assert codes.abs().max() == largest
    assert distance(convolution(), graph) > 0


def test_other_epilogues_are_refused() -> None:
    for model in (fused("silu"), fused("relu", residual=True)):
        assert refusal(PASS, calibrated(model, X)) == "codes cannot say what follows the convolution"


def test_padding_on_one_side_is_refused() -> None:
    model = program(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 16, 2, padding="same"))
    assert refusal(PASS, calibrated(model, X)) == "the padding differs between the two sides"


def test_nothing_observed_is_refused() -> None:
    reason = "nobody has observed the range of its input or of its result"
    assert refusal(PASS, capture(convolution(), (X,), {})) == reason


def test_a_range_of_nothing_is_refused() -> None:
    reason = "the range of its input or of its result is not finite, or 0 alone"
    assert refusal(PASS, calibrated(convolution(), torch.zeros_like(X))) == reason


def test_a_computed_weight_is_refused() -> None:
    graph = capture(program(lambda m, x, w: F.conv2d(x, w)), (X, randn(4, 8, 3, 3)), {})
    assert refusal(PASS, graph) == "the weight or the bias is not a constant"


def test_another_type_is_refused() -> None:
    graph = capture(convolution().double(), (X.double(),), {})
    assert refusal(PASS, graph) == "the weight is torch.float64, not float32"


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model: Any = convolution()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = torch.inf
    assert refusal(PASS, capture(model, (X,), {})) == "the weight is not finite"
