from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler import cpu
from graphopt.compiler.lossy import relative_distance
from graphopt.compiler.rewriter import Rewriter
from graphopt.kernels.gated_mlp import OP as GATED_MLP
from graphopt.kernels.linear_activation import OP
from graphopt.passes import fuse_linear_activation, quantize_linear_int8
from graphopt.passes._projections import rows_in_int8
from graphopt.passes.quantize_linear_int8 import PASS
from tests._models import randn
from tests.passes._harness import program, results, run, text
from tests.passes._lossy import lossy

X = randn(3, 5, 64)


def projection(**options: Any) -> nn.Module:
    return program(lambda m, x: m.layer(x), layer=nn.Linear(64, 80, **options))


def refusal(graph: Any) -> str | None:
    (match,) = PASS.matches(graph)
    return PASS.check(match)


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection(bias: bool) -> None:
    model = projection(bias=bias)
    graph = lossy(PASS, model, X)
    added = "layer.bias" if bias else "None"
    assert text(graph).splitlines()[0] == (
        "%0 = graphopt.dynamic_quantized_linear(x, <in int8: layer.weight>, <a scale a row: layer.weight>,"
        f" {added})"
    )
    assert list(PASS.matches(graph)) == []
    with torch.no_grad():
        assert 0 < relative_distance([model(X)], results(graph, [X])) < 0.015


def test_an_activation_goes_along() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(m.layer(x))

    model = program(forward, layer=nn.Linear(64, 80))
    graph = run(fuse_linear_activation.PASS, model, X).graph
    (match,) = PASS.matches(graph)
    assert PASS.check(match) is None
    assert "gelu" in text(lossy_of(graph))


def lossy_of(graph: Any) -> Any:
    for match in PASS.matches(graph):
        rewriter = Rewriter(match, PASS.name)
        PASS.rewrite(rewriter, match)
        rewriter.commit()
    return graph


@pytest.mark.parametrize(("vnni", "largest"), [(True, 127), (False, 63)])
def test_sums_of_pairs_do_not_saturate_without_vnni(
    vnni: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "features", lambda: cpu.Features(False, False, vnni, False))
    graph = lossy(PASS, projection(), X)
    (codes,) = (c.tensor for c in graph.constants.values() if c.how == "in int8")
    assert codes.abs().max() == largest
    assert vnni or 2 * 255 * int(codes.abs().max()) < 2**15


def test_codes_and_scales() -> None:
    weight = randn(6, 64)
    weight[2] = 0
    codes, scale = rows_in_int8(weight, 127)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, (6, 64), (6,))
    torch.testing.assert_close(codes * scale[:, None], weight, rtol=0, atol=float(scale.max()) / 2 + 1e-6)
    assert not codes[2].any()


def test_few_weights_are_refused() -> None:
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(8, 8))
    assert "64 weights are too few" in str(refusal(capture(model, (randn(2, 8),), {})))


def test_a_computed_weight_is_refused() -> None:
    model = program(lambda m, x, w: F.linear(x, w))
    assert refusal(capture(model, (X, randn(80, 64)), {})) == "the weight is not a constant"


def test_another_type_is_refused() -> None:
    graph = capture(projection().double(), (X.double(),), {})
    assert refusal(graph) == "the weight is torch.float64 of 2 dimensions, not float32 of 2"


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model: Any = projection()
    with torch.no_grad():
        model.layer.weight[0, 0] = torch.inf
    assert refusal(capture(model, (X,), {})) == "the weight is not finite"


def test_a_residual_is_refused() -> None:
    model = program(
        lambda m, x, r: OP.overload(x, m.weight, None, "relu", 1.0, r), weight=nn.Parameter(randn(80, 64))
    )
    graph = capture(model, (X, randn(3, 5, 80)), {})
    assert refusal(graph) == "a residual is added behind the activation"


def test_a_gated_block_has_two_products() -> None:
    model = program(
        lambda m, x: GATED_MLP.overload(x, m.gate, m.up, None, m.bias, "gelu"),
        gate=randn(80, 64) / 8,
        up=randn(80, 64, seed=1) / 8,
        bias=randn(80),
    )
    graph = lossy(PASS, model, X)
    product = "graphopt.dynamic_quantized_linear(x, <in int8: {0}>, <a scale a row: {0}>, {1})"
    assert text(graph).splitlines()[:3] == [
        "%0 = " + product.format("up", "bias"),
        "%1 = " + product.format("gate", "None, gelu, 1"),
        "%2 = mul(%1, %0)",
    ]
    with torch.no_grad():
        assert 0 < relative_distance([model(X)], results(graph, [X])) < 0.02


def test_a_gated_block_with_one_computed_weight_is_refused() -> None:
    model = program(lambda m, x, up: GATED_MLP.overload(x, m.gate, up), gate=randn(80, 64))
    assert refusal(capture(model, (X, randn(80, 64)), {})) == "the weight is not a constant"


def test_it_waits_for_its_name() -> None:
    assert (PASS.exact, PASS.kind) == (False, "cast")
    assert quantize_linear_int8.PASS is PASS
