"""``opt.export_onnx``: a model that others run, by the user's names."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import InputError, LoweringError
from graphopt.runtime import export_onnx
from tests import _models
from tests._models import Example, randn, randomised
from tests.passes._harness import program

MODELS = {
    "bert": _models.bert,
    "gpt2 with caches": functools.partial(_models.gpt2, use_cache=True),
    "llama": _models.llama,
    "cnn": _models.cnn,
}


@functools.cache
def optimized(name: str) -> tuple[Example, graphopt.OptimizedModel]:
    example = MODELS[name]()
    options: dict[str, Any] = {"executors": ("eager",), "effort": "fast", "dynamic": example.dynamic}
    return example, graphopt.optimize(example.model, example.args, example.kwargs, **options)


def fed(example: Example, names: list[str]) -> dict[str, Any]:
    given = [x.numpy() for x in (*example.args, *example.kwargs.values())]
    return dict(zip(names, given, strict=True))


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def assert_right(example: Example, after: list[torch.Tensor]) -> None:
    before, double = tensors(example()), example.model.double()
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, (example.args, example.kwargs)
    )
    with torch.no_grad():
        reference = tensors(double(*args, **kwargs))
    example.model.float()
    found = compare(before, after, reference, MODEL_FLOOR_ULPS)
    assert found.ok, found.reason


def loaded(path: Path) -> onnx.ModelProto:
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path)


def metadata(props: Any) -> dict[str, str]:
    return {prop.key: prop.value for prop in props}


def unpacked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with Q, K and V apart where attention takes them packed, for which the CPU has no kernel."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 0, -1]), "flat"))
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MultiHeadAttention" and node.input[1] == "":
            parts = [f"{node.output[0]}_{part}" for part in "qkv"]
            apart = [f"{part}_apart" for part in parts]
            nodes.append(onnx.helper.make_node("Split", [node.input[0]], apart, axis=3, num_outputs=3))
            for source, part in zip(apart, parts, strict=True):
                nodes.append(onnx.helper.make_node("Reshape", [source, "flat"], [part]))
            node.input[:3] = parts
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("device", ["cpu", "cuda", "portable"])
@pytest.mark.parametrize("name", MODELS)
def test_plain_onnx_runtime_gives_the_originals_answer(name: str, device: Any, tmp_path: Path) -> None:
    example, opt = optimized(name)
    path = tmp_path / "model.onnx"
    portable = device == "portable"
    opt.export_onnx(path, portable, device=None if portable else device)
    model = loaded(path)
    domains = {node.domain for node in model.graph.node} | {entry.domain for entry in model.opset_import}
    assert domains == {""} if portable else domains <= {"", "com.microsoft"}
    for_the_cpu = unpacked(model).SerializeToString()
    session = onnxruntime.InferenceSession(for_the_cpu, providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]
    assert_right(example, [torch.from_numpy(x) for x in session.run(names, fed(example, inputs))])


def test_names_dimensions_and_structure_are_the_users(tmp_path: Path) -> None:
    example, opt = optimized("gpt2 with caches")
    opt.export_onnx(tmp_path / "model.onnx")
    model = loaded(tmp_path / "model.onnx")
    (tokens,) = model.graph.input
    assert tokens.name == "input_ids"
    assert [dim.dim_param for dim in tokens.type.tensor_type.shape.dim] == ["batch", "seq"]
    logits, *caches = model.graph.output
    assert [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim] == [
        "batch",
        "seq",
        _models.VOCABULARY,
    ]
    stated = json.loads(metadata(model.metadata_props)["graphopt.outputs"])
    assert stated["type"] == type(example()).__name__
    assert stated["items"]["logits"] == logits.name == "logits"
    named = pytree.tree_leaves(stated["items"]["past_key_values"]["items"])
    assert [cache.name for cache in caches] == [name for name in named if name.startswith("past_key_values.")]


def test_a_node_leads_back_to_module_and_source_line(tmp_path: Path) -> None:
    optimized("bert")[1].export_onnx(tmp_path / "model.onnx")
    model = loaded(tmp_path / "model.onnx")
    rows = [metadata(node.metadata_props) for node in model.graph.node]
    assert all(key.startswith("graphopt.") for row in rows for key in row)
    modules = {row.get("graphopt.module") for row in rows}
    assert "encoder.layer.1.attention.self" in modules
    (source,) = {
        row["graphopt.source"].rpartition(":")[0]
        for row in rows
        if row.get("graphopt.module") == "encoder.layer.1.attention.self"
        and "attention" in row["graphopt.node"]
    }
    assert source.endswith(".py")
    assert "ai.onnx 23" in model.doc_string
    assert json.loads(metadata(model.metadata_props)["graphopt.opsets"])["ai.onnx"] == 23


ALONE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("graphopt", "torch", "onnx", "onnx_ir", "onnxscript"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
given = dict(np.load("inputs.npz"))
np.savez("outputs.npz", *session.run(None, given))
assert not {"graphopt", "torch", "onnx"} & set(sys.modules)
"""


def test_it_runs_where_there_is_no_graphopt(tmp_path: Path) -> None:
    example, opt = optimized("bert")
    opt.export_onnx(tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", **fed(example, list(example.kwargs)))
    ran = subprocess.run(
        [sys.executable, "-I", "-c", ALONE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "outputs.npz") as results:
        assert_right(example, [torch.from_numpy(results[name]) for name in results.files])


# Models that are made to be awkward


def exported(
    forward: Any, *inputs: torch.Tensor, tmp_path: Path, weights: Any = None, **options: Any
) -> onnx.ModelProto:
    opt = graphopt.optimize(
        program(forward, **(weights or {})), inputs, executors=("eager",), effort="fast", level=0
    )
    opt.export_onnx(tmp_path / "model.onnx", **options)
    return loaded(tmp_path / "model.onnx")


def test_names_that_collide_are_told_apart(tmp_path: Path) -> None:
    def forward(m: Any, add: torch.Tensor, mul: torch.Tensor) -> Any:
        total = add + mul
        return {"add": total * 2, "mul": add, "val_0": [total, total, m.w, None, 3]}

    x, y = randn(2, 3), randn(2, 3, seed=1)
    model = exported(forward, x, y, tmp_path=tmp_path, weights={"w": randn(4)})
    assert [value.name for value in model.graph.input] == ["add", "mul"]
    names = [value.name for value in model.graph.output]
    assert names == ["add_1", "mul_1", "val_0.0", "val_0.1", "val_0.2"]
    stated = json.loads(metadata(model.metadata_props)["graphopt.outputs"])["items"]
    assert stated["add"] == "add_1"
    constants = [stated["val_0"]["items"][place] for place in "34" if place in stated["val_0"]["items"]]
    assert {"constant": "3"} in constants
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    results = session.run(names, {"add": x.numpy(), "mul": y.numpy()})
    for got, expected in zip(results, [(x + y) * 2, x, x + y, x + y], strict=False):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_a_nested_input_keeps_its_path_in_the_metadata(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, pair: dict[str, torch.Tensor], scale: float = 2.0) -> tuple[torch.Tensor]:
            return (pair["a"] - scale * pair["b"],)

    given = {"a": randn(2, 3), "b": randn(2, 3, seed=1)}
    opt = graphopt.optimize(Nested().eval(), (given, 3.0), executors=("eager",), effort="fast")
    opt.export_onnx(tmp_path / "model.onnx")
    model = loaded(tmp_path / "model.onnx")
    rows = json.loads(metadata(model.metadata_props)["graphopt.inputs"])
    names = [value.name for value in model.graph.input]
    assert [row["name"] for row in rows if "name" in row] == names
    assert all(name.isidentifier() for name in names)
    assert [row["constant"] for row in rows if "constant" in row] == ["3.0"]
    assert [value.name for value in model.graph.output] == ["output_0"]


def test_a_dimension_without_a_name_is_called_after_its_input(tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], dim=0)

    opt = graphopt.optimize(program(forward), (randn(3, 4),), executors=("eager",), dynamic={"x": {0: "n"}})
    opt.export_onnx(tmp_path / "model.onnx")
    (result,) = loaded(tmp_path / "model.onnx").graph.output
    assert result.name == "output"
    assert result.type.tensor_type.shape.dim[0].dim_param.replace(" ", "") in ("2*n", "n*2")


# What cannot be exported


def test_an_op_without_translation_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the former one")

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x) + 1

    with pytest.raises(LoweringError, match=r"bessel_j0.* has no ONNX translation") as caught:
        exported(forward, randn(3), tmp_path=tmp_path)
    line = forward.__code__.co_firstlineno + 1
    assert f"{Path(__file__).name}:{line}" in str(caught.value.where)
    assert path.read_text() == "the former one"


def test_a_fused_op_in_float64_is_refused(tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x, m.w, m.b))

    model = program(forward, w=randn(6, 8).double(), b=randn(6).double())
    opt = graphopt.optimize(model, (randn(2, 8).double(),), executors=("eager",), effort="fast")
    with pytest.raises(LoweringError, match=r"linear_activation.* do not take float64"):
        opt.export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_size_is_refused(tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        return x + 1, x.shape[0]

    opt = graphopt.optimize(program(forward), (randn(3, 4),), executors=("eager",), dynamic={"x": {0: "n"}})
    with pytest.raises(LoweringError, match="is a size"):
        opt.export_onnx(tmp_path / "model.onnx")


def test_an_older_opset_serves_what_is_the_same_in_it(tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(m.linear(x)).reshape(2, -1)

    weights = {"linear": randomised(nn.Linear(8, 6))}
    model = exported(forward, randn(2, 5, 8), tmp_path=tmp_path, weights=weights, opset=19)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]
    onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_newer_opset_serves_what_only_took_on_more_types(name: str, tmp_path: Path) -> None:
    """Attention, too: in opset 24 it has one input more, which may be left out."""
    example, opt = optimized(name)
    answers = []
    for opset in (23, 24):
        opt.export_onnx(tmp_path / "model.onnx", True, opset=opset)
        written = loaded(tmp_path / "model.onnx")
        assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", opset)]
        assert "Attention" in {node.op_type for node in written.graph.node}
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        answers.append(session.run(None, fed(example, names)))
    for older, newer in zip(*answers, strict=True):
        np.testing.assert_array_equal(older, newer)


def test_an_operator_that_changed_its_meaning_is_refused() -> None:
    """Of a newer schema, what is left out may be new, and nothing else."""
    schema = onnx.defs.get_schema
    newer, older = schema("Attention", 24, ""), schema("Attention", 23, "")
    assert export_onnx._extends(newer, older, may_grow=True)
    assert not export_onnx._extends(newer, older, may_grow=False)
    assert not export_onnx._extends(older, newer, may_grow=True)
    split = schema("Split", 18, ""), schema("Split", 13, "")  # num_outputs may be left out: it was not there
    assert export_onnx._extends(*split, may_grow=True)
    reduce = schema("ReduceSum", 13, ""), schema("ReduceSum", 11, "")  # axes were an attribute
    assert not export_onnx._extends(*reduce, may_grow=True)


def test_an_opset_too_old_for_an_operator_is_refused(tmp_path: Path) -> None:
    opt = optimized("llama")[1]
    with pytest.raises(LoweringError, match=r"is not in opset 22: it is in 23") as caught:
        opt.export_onnx(tmp_path / "model.onnx", True, opset=22)
    assert ".py:" in str(caught.value.where)
    with pytest.raises(InputError, match="opset=17 cannot be written"):
        opt.export_onnx(tmp_path / "model.onnx", opset=17)
    with pytest.raises(InputError, match="device='tpu' is unknown"):
        opt.export_onnx(tmp_path / "model.onnx", device="tpu")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
