"""The ``onednn`` executor: packed weights compute what the graph says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.compare import worst_error
from graphopt.errors import LoweringError
from graphopt.ir.op import OPS
from graphopt.runtime.executors.onednn import _EPILOGUES, Onednn, OnednnProgram
from graphopt.runtime.region import extract
from graphopt.runtime.target import Target
from tests._models import randn
from tests.passes._harness import program, results

CPU = Target(torch.device("cpu"))
X = randn(3, 5, 16)


def compiled(forward: Any, *args: torch.Tensor, **weights: Any) -> tuple[OnednnProgram, Any]:
    graph = capture(program(forward, **weights), args, {})
    return Onednn().compile(extract(graph, graph.calls, "all"), CPU, "fast"), graph


def targets(built: OnednnProgram) -> str:
    return " ".join(str(node.target) for node in built._module.graph.nodes)


@pytest.mark.parametrize("activation", sorted(_EPILOGUES))
def test_an_activation_is_an_epilogue(activation: str) -> None:
    fused = OPS["linear_activation"].overload

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return fused(x, m.weight, m.bias, activation, 0.1)

    built, graph = compiled(forward, X, weight=randn(8, 16), bias=randn(8))
    assert "mkldnn._linear_pointwise.default" in targets(built)
    assert worst_error(built.run([X]), results(graph, [X], float64=True)) < 1e-5


def test_an_activation_that_onednn_has_not() -> None:
    fused = OPS["linear_activation"].overload

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return fused(m.layer(x), m.weight, None, "mish")

    built, graph = compiled(forward, X, layer=nn.Linear(16, 16), weight=randn(8, 16))
    assert worst_error(built.run([X]), results(graph, [X], float64=True)) < 1e-5


def test_a_residual_is_added_behind_the_product() -> None:
    fused = OPS["linear_activation"].overload

    def forward(m: Any, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return fused(x, m.weight, None, "none", 1.0, r)

    residual = randn(3, 5, 8)
    built, graph = compiled(forward, X, residual, weight=randn(8, 16))
    assert "mkldnn._linear_pointwise.binary" in targets(built)
    expected = results(graph, [X, residual], float64=True)
    assert worst_error(built.run([X, residual]), expected) < 1e-5


@pytest.mark.parametrize("activation", ["none", "gelu", "mish"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_8_bits(activation: str, bias: bool) -> None:
    op = OPS["dynamic_quantized_linear"].overload

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return op(x, m.weight, m.scale, m.bias if bias else None, activation)

    weight = torch.randint(-63, 64, (8, 16), dtype=torch.int8)
    built, graph = compiled(forward, X, weight=weight, scale=torch.rand(8) / 63, bias=randn(8))
    assert "int8_linear" in targets(built)
    assert worst_error(built.run([X]), results(graph, [X], float64=True)) < 1e-5
    _, times = built.profile([X])
    assert [row.op for row in times] == ["int8_linear"]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "mish"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_8_bits_with_fixed_steps(activation: str, bias: bool) -> None:
    op = OPS["static_quantized_linear"].overload

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        added = m.bias if bias else None
        return op(x, m.weight, m.scale, m.factor, 117, added, activation=activation)

    weight = torch.randint(-63, 64, (8, 16), dtype=torch.int8)
    weights = {"weight": weight, "scale": torch.rand(8) / 2000, "factor": 20 + 20 * torch.rand(16)}
    built, graph = compiled(forward, X, **weights, bias=randn(8))
    assert "static_int8_linear" in targets(built)
    assert worst_error(built.run([X]), results(graph, [X], float64=True)) < 1e-5
    far = 100 * X  # beyond the range
    assert worst_error(built.run([far]), results(graph, [far], float64=True)) < 1e-5


def test_nothing_to_pack() -> None:
    with pytest.raises(LoweringError, match="no product of the region has a weight to pack"):
        compiled(lambda m, x: x.relu(), X)
    with pytest.raises(LoweringError, match="no product"):
        compiled(lambda m, x, w: torch.nn.functional.linear(x, w), X, randn(8, 16))


def test_the_cpu_only() -> None:
    graph = capture(program(lambda m, x: x.relu()), (X,), {})
    target = Target(torch.device("cuda:0"))
    assert "runs on the CPU, the target is cuda:0" in str(Onednn().supports(graph.calls[0], target))
    assert Onednn().supports(graph.calls[0], CPU) is None
