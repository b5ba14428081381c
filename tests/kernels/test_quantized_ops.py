"""The ops in 8 and 4 bits with constant weights, as models have them: which kernels run, and of what.

The generic tests hand weights over as inputs, and then ONNX Runtime packs none of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.compiler import cpu
from graphopt.kernels import block_quantized_linear, dynamic_quantized_linear, quantized_conv
from graphopt.kernels.block_quantized_linear import dequantized, packed, rounded, unpacked
from graphopt.kernels.static_quantized_linear import OP as STATIC
from tests._models import generator, randn
from tests.kernels.test_ops import to_onnx
from tests.passes._harness import program

BLOCKED = block_quantized_linear.OP
X = randn(3, 5, 80)


def codes_of(*shape: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator())


def run(model: nn.Module, x: torch.Tensor, folder: Path) -> tuple[torch.Tensor, Counter[str]]:
    """What ONNX Runtime computes, and the nodes that it runs once it has optimized the model."""
    made = to_onnx(torch.export.export(model, (x,), strict=False))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    bytes_ = made.SerializeToString()
    session = onnxruntime.InferenceSession(bytes_, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    nodes = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    return torch.from_numpy(found), nodes


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# block_quantized_linear


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_low_first(bits: int) -> None:
    codes = codes_of(6, 3, 32, bits=bits)
    weight = packed(codes, bits)
    assert (weight.dtype, weight.shape) == (torch.uint8, (6, 3, 4 * bits))
    assert torch.equal(unpacked(weight, bits), codes)
    if bits == 4:
        assert int(weight[0, 0, 0]) == int(codes[0, 0, 0]) + 16 * int(codes[0, 0, 1])


@pytest.mark.parametrize("features", [80, 96, 65])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_reads_the_same_layout(bits: int, features: int, tmp_path: Path) -> None:
    """Its packed kernels, in float32: every weight at its place, with its own scale, whatever its sign."""
    weight, scale = packed(codes_of(24, 3, 32, bits=bits), bits), randn(24, 3) / 2**bits
    model = program(
        lambda m, x: BLOCKED.overload(x, m.weight, m.scale, bits, m.bias, activation="silu"),
        weight=weight,
        scale=scale,
        bias=randn(24),
    )
    x = randn(3, 5, features)
    found, nodes = run(model, x, tmp_path)
    expected = F.silu(F.linear(x, dequantized(weight, scale, bits, features), randn(24)))
    assert apart(found, expected) < 1e-5
    assert nodes["MatMulNBits"] == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_products_in_integers_round_the_input_by_blocks(bits: int, tmp_path: Path) -> None:
    if not cpu.features().vnni:
        pytest.skip("this processor has no VNNI, and its kernels may compute in float32")
    x = X * torch.logspace(-3, 3, 5)[:, None]  # rows of very different sizes
    weight, scale = packed(codes_of(24, 3, 32, bits=bits), bits), randn(24, 3) / 2**bits
    model = program(
        lambda m, x: BLOCKED.overload(x, m.weight, m.scale, bits, rounds_input=True),
        weight=weight,
        scale=scale,
    )
    found, _ = run(model, x, tmp_path)
    with torch.no_grad():
        expected = model(x)
    wide = F.linear(x, dequantized(weight, scale, bits, 80))
    assert apart(found, expected) < 1e-4  # that is what the reference says it computes
    assert apart(found, wide) > 1e-3  # and no more exactly


def test_a_rounded_input_is_within_half_a_step_of_its_block() -> None:
    x = randn(2, 70)
    x[0, 32:64] = 0
    found = rounded(x, 32)
    assert found.shape == x.shape
    assert not found[0, 32:64].any()
    for start in (0, 32, 64):
        block = slice(start, start + 32)
        step = x[:, block].abs().amax(1, keepdim=True) / 127
        assert ((found[:, block] - x[:, block]).abs() <= step / 2 + 1e-7).all()


# static_quantized_linear


@pytest.mark.parametrize("bias", [True, False])
def test_a_static_product_is_quantized_and_multiplied_in_two_nodes(bias: bool, tmp_path: Path) -> None:
    weight = torch.randint(-127, 128, (24, 80), dtype=torch.int8, generator=generator())
    model = program(
        lambda m, x: STATIC.overload(x, m.weight, m.scale, m.factor, 97, m.bias if bias else None),
        weight=weight,
        scale=torch.rand(24, generator=generator()) / 4000,
        factor=10 + 30 * torch.rand(80, generator=generator()),
        bias=randn(24),
    )
    found, nodes = run(model, X, tmp_path)
    with torch.no_grad():
        assert apart(found, model(X)) < 1e-5
    assert (nodes["QuantizeLinear"], nodes["MatMulIntegerToFloat"], nodes["Add"]) == (1, 1, 0)


def test_numbers_beyond_the_range_are_cut_off() -> None:
    weight, ones = torch.eye(4, dtype=torch.int8), torch.ones(4)
    x = torch.tensor([[-1e30, -100.0, 100.0, 1e30]])
    found = STATIC(x, weight, ones, ones, 28)
    assert found.tolist() == [[-28.0, -28.0, 100.0, 227.0]]


# quantized_conv


STEPS = (0.02, 120, 0.1, 0)


class Two(nn.Module):
    """Two convolutions, the second of which reads with the steps that the first one writes with."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("one", (16, 8, 3, 3)), ("two", (16, 16, 1, 1))):
            weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator())
            self.register_buffer(name, weight)
        self.register_buffer("scale", torch.rand(16, generator=generator()) / 1000 + 1e-4)
        self.register_buffer(
            "bias", torch.randint(-9999, 9999, (16,), dtype=torch.int32, generator=generator())
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1], 1)
        y = quantized_conv.OP.overload(x, self.one, self.scale, self.bias, *plain, *STEPS)
        return quantized_conv.OP.overload(y, self.two, self.scale, None, *plain, 0.1, 0, 0.05, 128)


def test_onnx_runtime_passes_codes_from_one_convolution_to_the_next(tmp_path: Path) -> None:
    model, x = Two().eval(), randn(2, 8, 14, 14)
    found, nodes = run(model, x, tmp_path)
    assert nodes["QLinearConv"] == 2
    assert (nodes["QuantizeLinear"], nodes["DequantizeLinear"], nodes["Conv"]) == (1, 1, 0)
    with torch.no_grad():
        off = (found - model(x)).abs() / 0.05
    assert off.max() < 1.5  # a sum in another order may end on the other side of a code's edge
    assert (off > 0.5).double().mean() < 0.01


def test_a_zero_point_of_zero_is_a_relu() -> None:
    x, weight = randn(1, 1, 4, 4), torch.ones(1, 1, 1, 1, dtype=torch.int8)
    plain: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1)
    found = quantized_conv.OP(x, weight, torch.ones(1), None, *plain, 0.02, 128, 0.02, 0)
    torch.testing.assert_close(found, x.relu(), rtol=0, atol=0.02)
    assert not found[x < 0].any()


# dynamic_quantized_linear


def test_a_row_has_the_same_codes_in_whatever_batch_it_comes() -> None:
    weight = torch.randint(-127, 128, (24, 80), dtype=torch.int8, generator=generator())
    scale = torch.rand(24, generator=generator())
    others = torch.cat([1e4 * randn(2, 80), X[0], torch.zeros(1, 80)])
    alone = dynamic_quantized_linear.OP(X[0], weight, scale)
    torch.testing.assert_close(dynamic_quantized_linear.OP(others, weight, scale)[2:-1], alone)
    assert not dynamic_quantized_linear.OP(others, weight, scale)[-1].any()


def test_dynamic_codes_hold_zero_exactly_and_use_all_of_their_range() -> None:
    x = torch.cat([X[0], X[0].abs() + 1, -X[0].abs() - 1])
    x[:, 3] = 0
    codes, step, zero = dynamic_quantized_linear.quantized_rows(x)
    assert torch.equal(codes[:, 3:4], zero)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) == 0
    assert float(codes.max()) == 255
    assert (((codes - zero) * step - x).abs() <= step * 1.001).all()


def test_a_constant_weight_is_multiplied_in_one_node(tmp_path: Path) -> None:
    weight = torch.randint(-127, 128, (24, 80), dtype=torch.int8, generator=generator())
    model = program(
        lambda m, x: dynamic_quantized_linear.OP.overload(x, m.weight, m.scale, m.bias, "gelu"),
        weight=weight,
        scale=torch.rand(24, generator=generator()) / 1000,
        bias=randn(24),
    )
    found, nodes = run(model, X, tmp_path)
    with torch.no_grad():
        assert apart(found, model(X)) < 1e-5
    assert (nodes["MatMulIntegerToFloat"], nodes["Transpose"]) == (1, 0)
