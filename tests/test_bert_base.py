"""BERT-base, the promise in numbers: what must be fused in the ONNX that is run."""

from collections import Counter

import pytest

import graphopt
from bench.models import bert_base
from graphopt.ir.tuning import tuned_for
from graphopt.runtime.executors.ort import OrtProgram
from graphopt.runtime.lower_onnx import to_onnx

LAYERS = 12


@pytest.fixture(scope="module")
def optimized() -> graphopt.OptimizedModel:
    model, args, kwargs = bert_base(1, 128)
    return graphopt.optimize(model, args, kwargs, executors=("ort",))


def program_of(optimized: graphopt.OptimizedModel) -> OrtProgram:
    (step,) = optimized.plan.steps
    assert isinstance(step.program, OrtProgram)
    return step.program


def test_whole_model_is_one_region_on_onnx_runtime(optimized: graphopt.OptimizedModel) -> None:
    assert [step.executor for step in optimized.plan.steps] == ["ort"]


def test_every_attention_and_gelu_is_one_node_in_the_onnx_that_is_run(
    optimized: graphopt.OptimizedModel,
) -> None:
    counts = Counter(node.op_type for node in program_of(optimized).model.graph)
    assert counts["Attention"] + counts["MultiHeadAttention"] == LAYERS
    assert counts["BiasGelu"] == LAYERS
    assert counts["Softmax"] == counts["IsNaN"] == counts["Erf"] == counts["Gelu"] == 0
    assert counts["Gemm"] == 4 * LAYERS + 1  # Q, K and V are one product; the pooler is the last


def test_every_residual_norm_is_fused_in_the_onnx_that_is_run(optimized: graphopt.OptimizedModel) -> None:
    # On the CPU the fused op is a Sum and a LayerNormalization: SkipLayerNormalization takes 0.50 ms there
    # for 1x128x768, the pair 0.08 ms (ONNX Runtime 1.31), so each pair must come from one fused node of ours.
    graph = program_of(optimized).model.graph
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    residual = [n for n in norms if "add_layer_norm" in n.metadata_props["graphopt.node"]]
    assert len(residual) == 2 * LAYERS
    for norm in residual:
        summed = norm.inputs[0].producer()
        assert summed.op_type == "Sum"
        assert summed.metadata_props["graphopt.node"] == norm.metadata_props["graphopt.node"]


def test_where_the_fused_kernel_is_the_fast_one_it_is_used(optimized: graphopt.OptimizedModel) -> None:
    (step,) = optimized.plan.steps
    with tuned_for("any"):
        counts = Counter(node.op_type for node in to_onnx(step.region.graph).graph)
    assert counts["SkipLayerNormalization"] == 2 * LAYERS


def test_the_report_counts_the_fusions(optimized: graphopt.OptimizedModel) -> None:
    made = optimized.report.rewrites_by_pass()
    assert made["fuse_attention"] == made["merge_linears"] == LAYERS
    assert made["fuse_linear_activation"] == LAYERS + 1  # and the pooler
    assert made["fuse_add_layer_norm"] == 2 * LAYERS
    assert not [rewrite for rewrite in optimized.report.rewrites if not rewrite.kept]


def test_onnx_nodes_lead_back_to_module_and_source_line(optimized: graphopt.OptimizedModel) -> None:
    graph = program_of(optimized).model.graph
    attention = next(node for node in graph if node.op_type in ("Attention", "MultiHeadAttention"))
    assert attention.metadata_props["graphopt.module"] == "encoder.layer.0.attention.self"
    file, line = attention.metadata_props["graphopt.source"].rsplit(":", 1)
    assert file.endswith("sdpa_attention.py")
    assert int(line) > 0
