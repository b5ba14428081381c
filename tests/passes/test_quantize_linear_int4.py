from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler import cpu
from graphopt.compiler.lossy import relative_distance
from graphopt.kernels.block_quantized_linear import dequantized, packed
from graphopt.kernels.gated_mlp import OP as GATED_MLP
from graphopt.passes import fuse_linear_activation
from graphopt.passes._blocks import in_blocks
from graphopt.passes.quantize_linear_int4 import PASS
from tests._models import randn
from tests.passes._harness import program, results, run, text
from tests.passes._lossy import lossy
from tests.passes._quantizing import projection, refusal, rewritten

X = randn(3, 5, 64)


@pytest.mark.parametrize("vnni", [True, False])
def test_a_projection(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: cpu.Features(False, False, vnni, False))
    model = projection()
    graph = lossy(PASS, model, X)
    assert text(graph).splitlines()[0] == (
        "%0 = graphopt.block_quantized_linear(x, <in 4 bits: layer.weight>, <a scale a block: layer.weight>,"
        f" 4, layer.bias, rounds_input={vnni})"
    )
    assert list(PASS.matches(graph)) == []
    with torch.no_grad():
        assert 0.02 < relative_distance([model(X)], results(graph, [X])) < 0.1


def test_only_the_packed_weight_is_kept() -> None:
    graph = lossy(PASS, projection(bias=False), X)
    graph.drop_unused_constants()
    held = {c.how: c.tensor for c in graph.constants.values()}
    assert {how: (t.dtype, tuple(t.shape)) for how, t in held.items()} == {
        "in 4 bits": (torch.uint8, (80, 2, 16)),
        "a scale a block": (torch.float32, (80, 2)),
    }
    assert sum(t.nbytes for t in held.values()) * 6 < 80 * 64 * 4


def test_an_activation_goes_along() -> None:
    model = program(lambda m, x: F.silu(m.layer(x)), layer=nn.Linear(64, 80))
    graph = rewritten(PASS, run(fuse_linear_activation.PASS, model, X).graph)
    assert "activation=silu" in text(graph)
    with torch.no_grad():
        assert relative_distance([model(X)], results(graph, [X])) < 0.12


def test_a_gated_block_has_two_products() -> None:
    model = program(
        lambda m, x: GATED_MLP.overload(x, m.gate, m.up), gate=randn(80, 64) / 8, up=randn(80, 64, seed=1) / 8
    )
    graph = lossy(PASS, model, X)
    assert [line.split("(")[0] for line in text(graph).splitlines()[:3]] == [
        "%0 = graphopt.block_quantized_linear",
        "%1 = graphopt.block_quantized_linear",
        "%2 = mul",
    ]
    with torch.no_grad():
        assert relative_distance([model(X)], results(graph, [X])) < 0.2


def test_dynamic_rows() -> None:
    model = projection()
    graph = lossy(PASS, model, X, dynamic={"x": {0: "batch", 1: "seq"}})
    other = randn(2, 7, 64)
    with torch.no_grad():
        assert relative_distance([model(other)], results(graph, [other])) < 0.1


# Which scales


def off(weight: torch.Tensor, bits: int) -> torch.Tensor:
    codes, scale = in_blocks(weight, bits)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    return (dequantized(packed(codes, bits), scale, bits, weight.shape[1]) - weight).norm() / weight.norm()


@pytest.mark.parametrize(("bits", "most"), [(4, 0.09), (8, 0.006)])
@pytest.mark.parametrize("features", [64, 70])
def test_what_rounding_costs(bits: int, most: float, features: int) -> None:
    assert 0 < off(randn(50, features), bits) < most


def test_4_bits_cut_the_largest_off_where_the_others_gain() -> None:
    """A plain scale of the largest over 7, as is usual, is a tenth further off."""
    weight = randn(500, 64)
    blocks = weight.unflatten(1, (2, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    plain = ((blocks / scale).round().clamp(-8, 7) * scale - blocks).norm() / weight.norm()
    assert off(weight, 4) < 0.9 * plain


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_does_not_see_the_others(bits: int) -> None:
    weight = randn(8, 96)
    large = weight.clone()
    large[:, :32] *= 1e6
    large[3, 64:] = 0
    codes, scale = in_blocks(weight, bits)
    other_codes, other_scale = in_blocks(large, bits)
    assert torch.equal(codes[:, 1], other_codes[:, 1])
    assert torch.equal(scale[:, 1], other_scale[:, 1])
    found = dequantized(packed(other_codes, bits), other_scale, bits, 96)
    assert not found[3, 64:].any()
    assert found.isfinite().all()


def test_few_codes_are_exact() -> None:
    """What 16 codes can say comes back as it was."""
    weight = torch.arange(-8.0, 8.0).repeat(6, 4) * 0.375
    assert off(weight, 4) == 0


# Refusals


def test_few_weights_are_refused() -> None:
    model = program(lambda m, x: m.layer(x), layer=nn.Linear(8, 8))
    assert refusal(PASS, capture(model, (randn(2, 8),), {})) == (
        "64 weights are too few: reading them takes no time"
    )


def test_a_computed_weight_is_refused() -> None:
    graph = capture(program(lambda m, x, w: F.linear(x, w)), (X, randn(80, 64)), {})
    assert refusal(PASS, graph) == "the weight is not a constant"


def test_a_vector_is_refused() -> None:
    graph = capture(projection(), (X[0, 0],), {})
    assert refusal(PASS, graph) == "x has shape [64], not rows of a fixed length"


def test_another_type_is_refused() -> None:
    graph = capture(projection().double(), (X.double(),), {})
    assert refusal(PASS, graph) == "the weight is torch.float64 of 2 dimensions, not float32 of 2"


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model: Any = projection()
    with torch.no_grad():
        model.layer.weight[0, 0] = torch.nan
    assert refusal(PASS, capture(model, (X,), {})) == "the weight is not finite"
