"""What the fused ops are spelled as, by what runs them: for CUDA, the CPU, and any runtime."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import graphopt
from graphopt.capture.export import capture_any
from graphopt.ir.op import OPS
from graphopt.ir.tuning import tuned_for
from graphopt.runtime.lower_onnx import to_onnx
from tests import _models

LAYERS = 2

# What a BERT is made of, a mask of padding included; what is watched and not named is not there.
BERT = {
    "cuda": {
        "EmbedLayerNormalization": 1,
        "Gather": 1,
        "MultiHeadAttention": LAYERS,
        "Gemm": 4 * LAYERS + 1,
        "BiasGelu": LAYERS,
        "SkipLayerNormalization": 2 * LAYERS,
    },
    "cpu": {
        "Gather": 4,
        "LayerNormalization": 2 * LAYERS + 1,
        "Attention": LAYERS,
        "Gemm": 4 * LAYERS + 1,
        "BiasGelu": LAYERS,
    },
    "portable": {
        "Gather": 4,
        "LayerNormalization": 2 * LAYERS + 1,
        "Attention": LAYERS,
        "Gemm": 4 * LAYERS + 1,
        "Gelu": LAYERS,
    },
}
WATCHED = {name for counts in BERT.values() for name in counts} | {"Softmax", "Erf", "Tanh", "MatMul"}


@functools.cache
def bert(half: bool) -> ir.Model:
    example = _models.bert()
    model = example.model.half() if half else example.model
    opt = graphopt.optimize(
        model, (), example.kwargs, executors=("eager",), effort="fast", dynamic=example.dynamic
    )
    return opt._rewritten


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("runner", BERT)
def test_a_bert_is_made_of_fused_nodes(runner: Any, half: bool) -> None:
    with tuned_for(runner):
        model = to_onnx(bert(half))
    counts = Counter(node.op_type for node in model.graph)
    assert {name: n for name, n in counts.items() if name in WATCHED} == {**BERT[runner], "Tanh": 1}
    masks = {id(node.inputs[5]) for node in model.graph if node.op_type == "MultiHeadAttention"}
    assert len(masks) <= 1  # the layers share one addend


def test_the_norm_adds_the_bias_of_the_product_on_cuda() -> None:
    with tuned_for("cuda"):
        model = to_onnx(bert(False))
    for node in model.graph:
        if node.op_type == "SkipLayerNormalization":
            assert len(node.inputs) == 5
            product = node.inputs[0].producer()
            while product.op_type == "Reshape":
                product = product.inputs[0].producer()
            assert (product.op_type, len(product.inputs)) == ("Gemm", 2)


# Q, K and V packed


class SelfAttention(torch.nn.Module):
    """One product for Q, K and V, of two heads, and attention to all or to what is allowed."""

    def __init__(self, order: str = "qkv", bias: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 48, bias=bias)
        self.order, self.causal = order, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.project(x).split(16, dim=-1)
        heads = [parts["qkv".index(name)].unflatten(-1, (2, 8)) for name in self.order]
        return OPS["attention"].overload(*heads, None, self.causal)


def self_attention(**given: Any) -> ir.Model:
    graph, _ = capture_any(SelfAttention(**given).eval(), (torch.randn(3, 8, 16),), None, dynamic=None)
    with tuned_for("cuda"):
        return to_onnx(graph)


def test_q_k_and_v_of_one_product_stay_packed_on_cuda() -> None:
    """One kernel takes them apart and adds the bias; Gemm would copy it, and Split copy all three."""
    model = self_attention()
    assert sorted(n.op_type for n in model.graph if n.op_type != "Reshape") == ["Gemm", "MultiHeadAttention"]
    (attention,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert attention.inputs[1] is attention.inputs[2] is None
    assert attention.inputs[3].shape == [48]
    with tuned_for("cpu"):
        assert "Split" in {node.op_type for node in to_onnx(bert(False)).graph}


def test_a_packed_weight_is_kept_once() -> None:
    model = self_attention()
    weights = [value for value in model.graph.initializers.values() if value.shape == [48, 16]]
    (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
    assert weights == [gemm.inputs[1]]


@pytest.mark.parametrize("given", [{"order": "kqv"}, {"bias": False}, {"causal": True}], ids=str)
def test_what_the_packed_form_cannot_say_stays_apart(given: dict[str, Any]) -> None:
    model = self_attention(**given)
    assert {"Split", "MultiHeadAttention"} <= {node.op_type for node in model.graph}


def test_a_mask_costs_a_layer_one_kernel_on_cuda() -> None:
    """Where for rows without a key; before the layers Cast, Where, Expand, and two that find such rows."""
    with tuned_for("cuda"):
        counts = Counter(node.op_type for node in to_onnx(bert(True)).graph)
    assert {name: counts[name] for name in ("Where", "Expand", "ReduceMax", "Equal", "Transpose", "Not")} == {
        "Where": 1 + LAYERS, "Expand": 1, "ReduceMax": 1, "Equal": 1, "Transpose": 0, "Not": 0
    }  # fmt: skip


def causal(length: int, keys: int) -> ir.Model:
    query, key = torch.randn(2, length, 4, 8), torch.randn(2, keys, 4, 8)
    return called("attention", query, key, torch.randn(2, keys, 4, 8), None, True)


def called(name: str, *args: Any) -> ir.Model:
    """One call of an op for CUDA, in ONNX; its tensors are the inputs."""
    op = OPS[name].overload

    class Call(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            given = iter(tensors)
            return op(*(next(given) if isinstance(x, torch.Tensor) else x for x in args))

    inputs = tuple(x for x in args if isinstance(x, torch.Tensor))
    graph, _ = capture_any(Call().eval(), inputs, None, dynamic=None)
    with tuned_for("cuda"):
        return to_onnx(graph)


@pytest.mark.parametrize(("keys", "node"), [(6, "MultiHeadAttention"), (9, "Attention")])
def test_causality_is_left_to_multi_head_attention_where_both_count_from_one_end(
    keys: int, node: str
) -> None:
    model = causal(6, keys)
    assert [n.op_type for n in model.graph if n.op_type.endswith("Attention")] == [node]


# Nodes that only the CUDA provider has


def packed(dtype: torch.dtype, features: int = 16) -> tuple[Any, ...]:
    """Three sequences, one of them empty, with tokens in front of the first and behind the last."""
    offsets = torch.tensor([2, 9, 9, 13], dtype=torch.int32)
    x = [torch.randn(16, 4, features).to(dtype) for _ in range(3)]
    return (*x, offsets, 7)


def test_packed_attention_is_one_node_on_cuda_that_onnx_runtime_knows() -> None:
    model = called("packed_attention", *packed(torch.float16))
    assert "PackedMultiHeadAttention" in {node.op_type for node in model.graph}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, match="PackedMultiHead"):
        onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )  # its types and shapes are right: all that is missing is a kernel


@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 16), (torch.float16, 12)])
def test_packed_attention_is_a_mask_of_blocks_where_its_fast_kernel_does_not_fit(
    dtype: torch.dtype, features: int
) -> None:
    model = called("packed_attention", *packed(dtype, features))
    assert "Attention" in {node.op_type for node in model.graph}


def test_the_places_of_packed_tokens() -> None:
    """Sequences of 7, 0 and 4 tokens in rows of 7: the tokens' places, then the padding's."""
    model = called("packed_attention", *packed(torch.float16))
    (node,) = (node for node in model.graph if node.op_type == "PackedMultiHeadAttention")
    proto = ir.to_proto(model)
    offsets, places = (node.inputs[at].name for at in (5, 4))
    inner = onnx.utils.Extractor(proto).extract_model([offsets], [places])
    session = onnxruntime.InferenceSession(inner.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {offsets: np.array([2, 9, 9, 13], np.int32)})
    tokens = [*range(7), *range(14, 18)]
    assert found.ravel().tolist() == [*tokens, *sorted(set(range(21)) - set(tokens))]
    assert found.shape == (3, 7)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["attention", "packed_attention", "embedding_layer_norm", "linear_add_layer_norm"]
)
def test_the_cuda_provider_agrees(name: str) -> None:
    """In float16, as on a GPU, against the reference in float64."""
    from tests.kernels.test_ops import assert_right, cast, mapped, samples, tensors, within_half

    op = OPS[name]
    for given in samples(name):
        sample = mapped(cast(given, torch.float16), torch.clone)
        if not within_half(op, sample) or sample.kwargs:
            continue
        model = called(name, *sample.args)
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(),
            providers=["CUDAExecutionProvider", "CPUExecutionProvider"],
        )
        names = [value.name for value in session.get_inputs()]
        feed = {name: x.numpy() for name, x in zip(names, tensors(sample), strict=True)}
        results = session.run(None, feed)
        assert_right(op, sample, [torch.from_numpy(x) for x in results])
