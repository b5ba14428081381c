"""Lowering: weights keep their memory, whichever way they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.passes.fold_weight_layout import PASS as FOLD_WEIGHT_LAYOUT
from graphopt.passes.fuse_linear import PASS as FUSE_LINEAR
from graphopt.runtime.lower_onnx import to_onnx
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 5, 8)


def conv1d(m: Any, x: torch.Tensor) -> torch.Tensor:
    """GPT-2's projection: its weight is (features in, features out)."""
    return torch.addmm(m.b, x.view(-1, 8), m.w).view(2, 5, 6) @ m.v


def model() -> nn.Module:
    return program(conv1d, w=randn(8, 6), b=randn(6), v=randn(6, 4))


def test_a_transposed_weight_is_read_as_it_lies() -> None:
    ran = run([FUSE_LINEAR, FOLD_WEIGHT_LAYOUT], model(), X)
    lowered = to_onnx(ran.graph)
    products = [node for node in lowered.graph if node.op_type == "Gemm"]
    assert [node.attributes.get_int("transB", 0) for node in products] == [0, 0]
    own = dict(ran.model.named_parameters())
    for node, name in zip(products, ("w", "v"), strict=True):
        weight = node.inputs[1].const_value
        assert tuple(weight.shape) == tuple(own[name].shape)
        assert weight.numpy().ctypes.data == own[name].data_ptr()


def test_a_weight_that_lies_as_it_is_read_is_left_alone() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.linear(x)

    lowered = to_onnx(run([FUSE_LINEAR], program(forward, linear=nn.Linear(8, 6)), X).graph)
    (product,) = (node for node in lowered.graph if node.op_type == "Gemm")
    assert product.attributes.get_int("transB", 0) == 1


def test_the_session_computes_the_same() -> None:
    original = model()
    opt = graphopt.optimize(original, (X,), executors=("ort",), effort="fast")
    with torch.no_grad():
        reference = model().double()(X.double())
        found = compare(original(X), opt(X), reference, MODEL_FLOOR_ULPS)
    assert found.ok, found.reason
