"""Every registered op through all its faces, by one set of functions.

A result is right if it is at most twice as far from the reference in float64 as torch is in the same dtype,
with a floor of a few ulp of the largest exact value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.utils._pytree as pytree

import graphopt.kernels  # noqa: F401
from graphopt.ir.op import OPS, BadSample, Op, Sample, op_of
from graphopt.ir.tuning import tuned_for
from graphopt.kernels._onnx import OPSET

FLOOR_ULP = 8
KERNEL_OPS = list(OPS.values())  # before a test registers a toy


@functools.cache
def samples(name: str) -> list[Sample]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(OPS[name].samples())


CASES = [
    pytest.param(op, sample, id=f"{op.name}-{sample.label}")
    for op in KERNEL_OPS
    for sample in samples(op.name)
]
BAD = [pytest.param(op, bad, id=f"{op.name}-{bad.match}") for op in KERNEL_OPS for bad in op.bad_samples()]
over_samples = pytest.mark.parametrize(("op", "sample"), CASES)
over_ops = pytest.mark.parametrize("op", KERNEL_OPS, ids=lambda op: op.name)


def mapped(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    """The sample with every tensor changed, those in lists too."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, change, (sample.args, sample.kwargs))
    return replace(sample, args=args, kwargs=kwargs)


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    return mapped(sample, lambda x: x.to(dtype) if x.is_floating_point() else x)


def tensors(sample: Sample) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)]


def outputs(function: Callable[..., Any], sample: Sample) -> list[torch.Tensor]:
    result = function(*sample.args, **sample.kwargs)
    return list(result) if isinstance(result, tuple | list) else [result]


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return (actual.double() - exact).abs().max().nan_to_num(math.inf, math.inf).item()


def assert_right(
    op: Op, sample: Sample, actual: list[torch.Tensor], torch_is_the_measure: bool = True
) -> None:
    """Compare with the reference in float64 on the same numbers."""
    exact = outputs(op.reference, cast(sample, torch.float64))
    originals = outputs(op.reference, sample)
    assert len(actual) == len(exact)
    for mine, original, truth in zip(actual, originals, exact, strict=True):
        assert mine.shape == truth.shape
        assert mine.dtype == original.dtype
        allowed = FLOOR_ULP * torch.finfo(original.dtype).eps * truth.abs().max().item()
        if torch_is_the_measure:
            allowed = max(allowed, 2 * error(original, truth))
        assert error(mine, truth) <= allowed


def within_half(op: Op, sample: Sample) -> bool:
    """Whether the results stay finite in float16."""
    exact = outputs(op.reference, cast(cast(sample, torch.float16), torch.float64))
    return all(x.abs().max() < torch.finfo(torch.float16).max / 2 for x in exact)


# The op in torch: reference, dispatcher, shape rule, refusals, cost.


@over_samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reference_is_right_in_every_dtype(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    sample = cast(sample, dtype)
    if dtype == torch.float16 and not within_half(op, sample):
        pytest.skip("overflows float16")
    assert_right(op, sample, outputs(op, sample), torch_is_the_measure=False)


@over_samples
def test_schema_and_fake_implementation_hold(op: Op, sample: Sample) -> None:
    torch.library.opcheck(
        op.overload, sample.args, sample.kwargs, test_utils=("test_schema", "test_faketensor")
    )


@over_ops
def test_op_compiles_with_dynamic_shapes(op: Op) -> None:
    first = samples(op.name)[0]
    torch.library.opcheck(op.overload, first.args, first.kwargs, test_utils="test_aot_dispatch_dynamic")


@over_samples
def test_shape_rule_predicts_the_real_outputs(op: Op, sample: Sample) -> None:
    predicted = outputs(op.shape, mapped(sample, lambda x: x.to("meta")))
    real = outputs(op, sample)
    assert [(x.shape, x.dtype, x.stride()) for x in predicted] == [
        (x.shape, x.dtype, x.stride()) for x in real
    ]


@pytest.mark.parametrize(("op", "bad"), BAD)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_are_refused(op: Op, bad: BadSample, device: str) -> None:
    moved = mapped(Sample(bad.args, bad.kwargs), lambda x: x.to(device))
    with pytest.raises(bad.error, match=bad.match) as refusal:
        op(*moved.args, **moved.kwargs)
    assert str(refusal.value).startswith(f"{op.name}: ")


@over_samples
def test_cost_is_positive_and_needs_no_data(op: Op, sample: Sample) -> None:
    cost = op.cost(*sample.args, **sample.kwargs)
    meta = mapped(sample, lambda x: x.to("meta"))
    assert cost == op.cost(*meta.args, **meta.kwargs)
    assert cost.flops > 0
    moved = sum(x.nbytes for x in outputs(op, sample))
    assert cost.bytes > moved


@over_ops
def test_cost_doubles_with_the_batch(op: Op) -> None:
    first = samples(op.name)[0]
    batch = tensors(first)[0].shape[0]  # samples keep it apart from every other leading size
    double = mapped(first, lambda x: torch.cat([x, x]) if x.shape[0] == batch else x)
    once, twice = op.cost(*first.args, **first.kwargs), op.cost(*double.args, **double.kwargs)
    assert twice.flops == 2 * once.flops
    assert once.bytes < twice.bytes <= 2 * once.bytes


def test_registry_finds_an_op_by_its_overload() -> None:
    assert all(op_of(op.overload) is op for op in KERNEL_OPS)
    assert op_of(torch.ops.aten.add.Tensor) is None


# The ONNX lowering, against the reference in ONNX Runtime.


class Calls(torch.nn.Module):
    """One call of an op for every sample; the samples' tensors are the inputs."""

    def __init__(self, op: Op, calls: list[Sample]) -> None:
        super().__init__()
        self.op, self.calls = op, calls

    def forward(self, *inputs: torch.Tensor) -> list[list[torch.Tensor]]:
        given = iter(inputs)
        return [outputs(self.op.overload, mapped(call, lambda _: next(given))) for call in self.calls]


@dataclass
class Exported:
    """All of an op's samples as one ONNX model, run once.

    Args:
        calls: the samples, as they were run.
        results: ONNX Runtime's outputs of every sample.
        nodes: the operators that every sample's outputs depend on.
        domains: of all nodes.
    """

    calls: list[Sample]
    results: list[list[torch.Tensor]]
    nodes: list[list[str]]
    domains: set[str]


def auto_dims(name: str, x: torch.Tensor) -> dict[int, Any]:
    """Batch and length of anything but a vector, and every dimension of a mask, are dynamic."""
    last = x.dim() if name == "mask" else 2 if x.dim() >= 2 else 0
    return dict.fromkeys(range(last), torch.export.Dim.AUTO)


def doubled(program: torch.export.ExportedProgram, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs with every dynamic dimension twice as long."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    grown = []
    for node, x in zip(placeholders, inputs, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                x = torch.cat([x, x], dim=axis)
        grown.append(x)
    return grown


def operators(model: onnx.ModelProto, names: list[str]) -> list[str]:
    """The operators that some outputs of a model depend on."""
    producers = {name: node for node in model.graph.node for name in node.output if name}
    found, seen, pending = [], set(), list(names)
    while pending:
        node = producers.get(pending.pop())
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            found.append(node.op_type)
            pending += node.input
    return found


def run_onnx(model: onnx.ModelProto, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


def to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    table = {op.overload: op.onnx for op in OPS.values()}
    exported = torch.onnx.export(
        program, dynamo=True, custom_translation_table=table, opset_version=OPSET, verbose=False
    )
    assert exported is not None
    return exported.model_proto


@functools.cache
def exported(name: str, tuning: Any, dynamic: bool, dtype: torch.dtype) -> Exported:
    op = OPS[name]
    calls = [mapped(cast(sample, dtype), torch.clone) for sample in samples(name)]
    if dtype == torch.float16:
        calls = [call for call in calls if within_half(op, call)]
    inputs = [x for call in calls for x in tensors(call)]
    names = [argument.name for argument in op.overload._schema.arguments]
    dims = [
        auto_dims(given, x)
        for call in calls
        for given, value in (*zip(names, call.args, strict=False), *call.kwargs.items())
        for x in pytree.tree_leaves(value)
        if isinstance(x, torch.Tensor)
    ]
    program = torch.export.export(
        Calls(op, calls), tuple(inputs), dynamic_shapes=(tuple(dims),) if dynamic else None, strict=False
    )
    with tuned_for(tuning):
        model = to_onnx(program)
    if dynamic:
        grown = iter(doubled(program, inputs))
        calls = [mapped(call, lambda _: next(grown)) for call in calls]
    results = iter(run_onnx(model, [x for call in calls for x in tensors(call)]))
    names_left = iter(value.name for value in model.graph.output)
    per_call = [len(outputs(op, call)) for call in calls]
    return Exported(
        calls,
        [[next(results) for _ in range(n)] for n in per_call],
        [operators(model, [next(names_left) for _ in range(n)]) for n in per_call],
        {node.domain for node in (*model.graph.node, *(n for f in model.functions for n in f.node))},
    )


VARIANTS = [
    pytest.param("any", True, torch.float32, id="dynamic"),
    pytest.param("cpu", False, torch.float32, id="static, tuned for the CPU"),
    pytest.param("any", False, torch.float16, id="float16"),
    pytest.param("cuda", False, torch.float32, id="static, tuned for CUDA"),
    pytest.param("portable", True, torch.float32, id="portable"),
]


@over_samples
@pytest.mark.parametrize(("tuning", "dynamic", "dtype"), VARIANTS)
def test_onnx_runtime_agrees(op: Op, sample: Sample, tuning: str, dynamic: bool, dtype: torch.dtype) -> None:
    run = exported(op.name, tuning, dynamic, dtype)
    at = [i for i, call in enumerate(run.calls) if call.label == sample.label]
    if not at:
        pytest.skip("overflows float16")
    (i,) = at
    if dynamic and tensors(sample)[0].dim() > 1:
        assert tensors(run.calls[i])[0].shape != tensors(sample)[0].shape
    assert_right(op, run.calls[i], run.results[i])


NORM = {
    "any": "SkipLayerNormalization",
    "cpu": "LayerNormalization",
    "cuda": "SkipLayerNormalization",
    "portable": "LayerNormalization",
}
RMS = {
    "any": "SkipSimplifiedLayerNormalization",
    "cpu": "RMSNormalization",
    "cuda": "SkipSimplifiedLayerNormalization",
    "portable": "RMSNormalization",
}
MULTI = {
    "any": "MultiHeadAttention",
    "cpu": "MultiHeadAttention",
    "cuda": "MultiHeadAttention",
    "portable": "Attention",
}
MAIN_NODES = [
    ("attention", "no mask", MULTI),
    ("attention", "key padding", {**dict.fromkeys(MULTI, "Attention"), "cuda": "MultiHeadAttention"}),
    ("attention", "grouped heads, causal", "Attention"),
    ("add_layer_norm", "weight and bias", NORM),
    ("add_layer_norm", "four dimensions", "LayerNormalization"),
    ("add_rms_norm", "weight", RMS),
    ("rms_norm", "weight", "RMSNormalization"),
    ("rope", "halves", "RotaryEmbedding"),
    ("rope", "interleaved, partial, a table a sequence", "RotaryEmbedding"),
    ("linear_activation", "gelu", {**dict.fromkeys(MULTI, "BiasGelu"), "portable": "Gelu"}),
    ("linear_activation", "gelu_tanh", {**dict.fromkeys(MULTI, "Gelu"), "cuda": "FastGelu"}),
    ("linear_add_layer_norm", "all vectors", NORM),
    ("linear_cross_entropy", "no reduction", "Gemm"),
    ("conv_activation", "relu", "Conv"),
    ("group_norm_silu", "an image", "InstanceNormalization"),
    ("quantized_linear", "bias", "DequantizeLinear"),
    (
        "dynamic_quantized_linear",
        "bias",
        {**dict.fromkeys(MULTI, "MatMulIntegerToFloat"), "portable": "MatMulInteger"},
    ),
    ("block_quantized_linear", "4 bits, bias", {**dict.fromkeys(MULTI, "MatMulNBits"), "portable": "Gemm"}),
    (
        "static_quantized_linear",
        "bias",
        {**dict.fromkeys(MULTI, "MatMulIntegerToFloat"), "portable": "MatMulInteger"},
    ),
    ("quantized_conv", "bias", "Conv"),
    ("masked_mean_pool", "token mask", "MatMul"),
    ("pack_tokens", "a token a sequence", "Gather"),
    ("packed_attention", "three sequences", "Attention"),
    ("pointwise", "a gate", "Sigmoid"),
    (
        "embedding_layer_norm",
        "BERT",
        {**dict.fromkeys(MULTI, "LayerNormalization"), "cuda": "EmbedLayerNormalization"},
    ),
    ("gated_mlp", "gelu", "Gelu"),
    ("grouped_gated_mlp", "rows of each expert", "MatMul"),
    ("layer_norm_add", "weight and bias", "LayerNormalization"),
    ("rms_norm_add", "weight", "RMSNormalization"),
    ("sandwich_rms_norm", "both weights", {**RMS, "cpu": "Sum", "portable": "Sum"}),
    ("quick_gelu", "CLIP", {**dict.fromkeys(MULTI, "QuickGelu"), "portable": "Sigmoid"}),
    ("unpack_tokens", "holes, an empty sequence, padding on the left", "Gather"),
]


@pytest.mark.parametrize(("name", "label", "node"), MAIN_NODES)
@pytest.mark.parametrize("tuning", ["any", "cpu", "cuda", "portable"])
def test_onnx_has_the_intended_node(name: str, label: str, node: Any, tuning: str) -> None:
    run = exported(name, tuning, tuning in ("any", "portable"), torch.float32)
    (nodes,) = (found for call, found in zip(run.calls, run.nodes, strict=True) if call.label == label)
    assert nodes.count(node if isinstance(node, str) else node[tuning]) == 1


@pytest.mark.parametrize("op", KERNEL_OPS, ids=lambda op: op.name)
def test_portable_nodes_are_onnxs_own(op: Op) -> None:
    assert exported(op.name, "portable", True, torch.float32).domains == {""}


def test_every_op_has_an_intended_node() -> None:
    assert {name for name, _, _ in MAIN_NODES} == {op.name for op in KERNEL_OPS}


@pytest.mark.parametrize(("tuning", "dynamic", "dtype"), VARIANTS)
def test_attention_is_one_node(tuning: str, dynamic: bool, dtype: torch.dtype) -> None:
    """But for a fill that a score may reach, or that float16 has no number for."""
    run = exported("attention", tuning, dynamic, dtype)
    for call, nodes in zip(run.calls, run.nodes, strict=True):
        fill = call.kwargs.get("fill")
        if fill is not None and (fill > -1e30 or dtype == torch.float16) and fill != -math.inf:
            continue
        assert sum(node in ("Attention", "MultiHeadAttention") for node in nodes) == 1
        assert "Softmax" not in nodes
