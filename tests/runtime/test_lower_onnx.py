"""Lowering: weights keep their memory, whichever way they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.capture.export import capture
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.passes.fold_weight_layout import PASS as FOLD_WEIGHT_LAYOUT
from graphopt.passes.fuse_linear import PASS as FUSE_LINEAR
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.onnx_translation import has_translation
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


def test_what_cannot_be_folded_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    def looked_up(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x + torch.gather(m.table, 1, m.places)

    made = program(looked_up)
    made.register_buffer("table", randn(1, 64))  # more than NumPy chooses from
    made.register_buffer("places", torch.arange(8)[None])
    x = randn(2, 8)
    lowered = to_onnx(capture(made, (x,)))
    assert "GatherElements" in [node.op_type for node in lowered.graph]  # not evaluated
    assert not [row for row in caplog.records if row.levelname in ("WARNING", "ERROR")]


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


ATTENDED = {  # (batch, heads) of query, key and value
    "a memory for all sequences": ((3, 2), (1, 2), (1, 2)),
    "values for all sequences": ((3, 2), (3, 2), (1, 2)),
    "a query for all sequences": ((1, 2), (3, 2), (3, 2)),
    "a key for all heads": ((3, 4), (3, 1), (3, 1)),
    "a memory for all sequences, grouped heads": ((3, 4), (1, 2), (1, 2)),
}


@pytest.mark.parametrize("case", ATTENDED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_that_broadcasts_runs(case: str, dynamic: bool) -> None:
    def forward(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa="grouped" in case)

    inputs = [randn(*leading, length, 8) for leading, length in zip(ATTENDED[case], (4, 5, 5), strict=True)]
    batch = {name: {0: "batch"} for name, x in zip("qkv", inputs, strict=True) if x.shape[0] > 1}
    opt = graphopt.optimize(
        program(forward), tuple(inputs), executors=("ort",), effort="fast", dynamic=batch if dynamic else None
    )
    assert opt.plan.steps[0].executor == "ort"
    for size in (3, 7) if dynamic else (3,):
        given = [x.repeat(size, 1, 1, 1)[:size] if x.shape[0] > 1 else x for x in inputs]
        torch.testing.assert_close(opt(*given), forward(None, *given), rtol=1e-5, atol=1e-5)


def test_strides_are_nothing_to_onnx() -> None:
    """PyTorch takes a pooling of channels-last images apart into one that writes their strides down."""
    x = torch.randn(2, 8, 7, 7).contiguous(memory_format=torch.channels_last)

    class Pool(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.adaptive_avg_pool2d(x.relu(), 1)

    graph = capture(Pool().eval(), (x,))
    assert all(map(has_translation, graph.calls))
    assert [node.op_type for node in to_onnx(graph).graph] == ["Relu", "ReduceMean"]
