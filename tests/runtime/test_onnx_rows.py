"""Rows stay matrices between products: fewer Reshapes, and the same numbers to the bit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper, parser

from graphopt.capture.export import capture
from graphopt.runtime.lower_onnx import to_onnx
from graphopt.runtime.onnx_rows import keep_rows

SIZES = {"flat": [-1, 4], "back": [2, 3, 4], "wide": [2, 3, 2, 2], "zeros": [0, 0, -1]}


def parsed(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    """A model of opset 20 with weights w, v (4, 4), a vector b, and sizes by name; shapes inferred."""
    graph = parser.parse_graph(f"g ({inputs}) => ({outputs}) {{ {body} }}")
    draw = np.random.default_rng(0)
    for name, shape in (("w", (4, 4)), ("v", (4, 4)), ("b", (4,))):
        graph.initializer.append(numpy_helper.from_array(draw.normal(size=shape).astype(np.float32), name))
    for name, sizes in SIZES.items():
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def simplified(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """The model with its rows kept, once both have computed the same."""
    changed = ir.from_proto(model)
    keep_rows(changed)
    found = ir.to_proto(changed)
    onnx.checker.check_model(found, full_check=True)
    draw = np.random.default_rng(1)
    given = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for mine, before in zip(outputs(found, given), outputs(model, given), strict=True):
        assert mine.shape == before.shape
        assert (mine == before).all()
    names = [[value.name for value in side.graph.output] for side in (found, model)]
    assert names[0] == names[1]
    return found


def outputs(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, given)


def counts(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


BLOCK = """
    a = Reshape(x, flat)
    p = Gemm <transB = 1> (a, w, b)
    q = Reshape(p, back)
    r = Gelu(q)
    s = Add(r, x)
    t = LayerNormalization <axis = -1> (s, b)
    u = Reshape(t, flat)
    z = Gemm <transB = 1> (u, v)
"""


def test_what_is_done_row_by_row_is_done_on_matrices() -> None:
    model = parsed("float[2,3,4] x", "float[2,3,4] y", BLOCK + "y = Reshape(z, back)")
    assert counts(model)["Reshape"] == 4
    found = counts(simplified(model, x=(2, 3, 4)))
    assert found == {"Reshape": 2, "Gemm": 2, "Gelu": 1, "Add": 1, "LayerNormalization": 1}


def test_who_wants_the_tensor_gets_it_by_one_reshape() -> None:
    body = BLOCK + "y = Reshape(z, back) o = Softmax <axis = 1> (t) e = ReduceMean (s)"
    model = parsed("float[2,3,4] x", "float[2,3,4] y, float[2,3,4] o, float[1,1,1] e", body)
    assert counts(simplified(model, x=(2, 3, 4)))["Reshape"] == 4


def test_a_result_of_the_model_is_left_where_it_is_made() -> None:
    model = parsed("float[2,3,4] x", "float[2,3,4] t, float[6,4] z", BLOCK)
    found = simplified(model, x=(2, 3, 4))
    assert counts(found)["Reshape"] == 3
    (norm,) = (node for node in found.graph.node if node.op_type == "LayerNormalization")
    assert list(norm.output) == ["t"]


@pytest.mark.parametrize(
    "step",
    [
        "r = Add(q, other)",  # of one row for each sentence: repeated
        "r = LayerNormalization <axis = 1> (q, over)",
        "r = Softmax <axis = 1> (q)",
        "r = Transpose <perm = [1, 0, 2]> (q)",
    ],
)
def test_what_is_no_work_on_rows_keeps_its_tensor(step: str) -> None:
    body = f"""
        a = Reshape(x, flat) p = Gemm(a, w) q = Reshape(p, back) {step}
        u = Reshape(r, flat) z = Gemm(u, v)
    """
    shapes = {"x": (2, 3, 4), "other": (2, 1, 4), "over": (3, 4)}
    inputs = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = parsed(inputs, "float[6,4] z", body)
    assert counts(simplified(model, **shapes)) == counts(model)


def test_a_reshape_of_a_reshape_is_one_and_one_to_what_was_there_is_none() -> None:
    body = """
        p = Reshape(x, wide) q = Reshape(p, zeros) y = Softmax <axis = 1> (q)
        r = Reshape(x, wide) s = Reshape(r, flat) z = Softmax <axis = 0> (s)
    """
    model = parsed("float[2,3,4] x", "float[2,3,4] y, float[6,4] z", body)
    assert counts(simplified(model, x=(2, 3, 4))) == {"Softmax": 2, "Reshape": 1}


def test_a_result_is_not_renamed_by_what_it_equals() -> None:
    model = parsed("float[2,3,4] x", "float[2,3,4] y", "p = Reshape(x, wide) y = Reshape(p, zeros)")
    assert counts(simplified(model, x=(2, 3, 4))) == {"Reshape": 1}


def test_a_matrix_made_late_is_read_by_no_node_before_it() -> None:
    """The flattened input stands behind the sum that is moved onto it."""
    body = """
        a = Reshape(h, flat) p = Gemm(a, w) q = Reshape(p, back)
        s = Add(q, x) u = Reshape(s, flat) z = Gemm(u, v)
        c = Reshape(x, flat) d = Gemm(c, w)
    """
    model = parsed("float[2,3,4] h, float[2,3,4] x", "float[6,4] z, float[6,4] d", body)
    assert counts(simplified(model, h=(2, 3, 4), x=(2, 3, 4)))["Reshape"] == 2


def test_sizes_without_a_name_are_taken_for_no_others() -> None:
    model = parsed("float[2,3,4] h, float[2,3,4] x", "float[6,4] z", """
        a = Reshape(h, flat) p = Gemm(a, w) q = Reshape(p, back)
        s = Add(q, x) u = Reshape(s, flat) z = Gemm(u, v)
    """)  # fmt: skip
    changed = ir.from_proto(model)
    for node in changed.graph:
        for value in node.outputs:
            if value.shape is not None and len(value.shape) == 3:
                value.shape = ir.Shape([None, None, 4])
    keep_rows(changed)
    assert Counter(node.op_type for node in changed.graph)["Reshape"] == 3


def test_long_chains_are_walked_once() -> None:
    """Each sum has two ways to the one before: 2 ** 300 in all, and 300 deep."""
    steps = " ".join(f"s{i + 1} = Add(s{i}, s{i})" for i in range(300))
    body = f"s0 = Softmax <axis = 1> (x) {steps} u = Reshape(s300, flat) z = Gemm(u, w)"
    model = parsed("float[2,3,4] x", "float[6,4] z", body)
    changed = ir.from_proto(model)
    keep_rows(changed)
    assert Counter(node.op_type for node in changed.graph) == counts(model)


class Block(torch.nn.Module):
    """A projection, GELU, another one, and the sum and the norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return x


@pytest.mark.parametrize("dynamic", [{}, {"x": {0: "batch"}}], ids=["static", "dynamic batch"])
def test_of_a_traced_model_only_the_first_and_the_last_are_left(dynamic: dict[str, dict[int, str]]) -> None:
    model = Block().eval()
    graph = capture(model, (torch.randn(3, 5, 8),), dynamic=dynamic)
    proto = ir.to_proto(to_onnx(graph))
    onnx.checker.check_model(proto, full_check=True)
    assert counts(proto)["Reshape"] == 3  # of 8: into the first product, and what the last sum adds
    assert {i.data_type for i in proto.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}
    x = torch.randn(3 if not dynamic else 4, 5, 8)
    (found,) = outputs(proto, {proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x))
