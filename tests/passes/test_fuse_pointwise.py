from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.passes.default import pipeline
from graphopt.passes.fuse_pointwise import PASS
from graphopt.runtime.lower_onnx import to_onnx
from tests._models import bert, llama, randn
from tests.passes._harness import program, run, text

X, Y, V = randn(2, 5, 8), randn(2, 5, 8, seed=1), randn(8)


def programs(ran) -> list[str]:
    return [str(node.args[1]) for node in ran.graph.calls if "pointwise" in str(node.target)]


def test_a_chain_is_a_program() -> None:
    def forward(m, x, y):
        return torch.sigmoid(x * y) + 1

    ran = run(PASS, program(forward), X, Y)
    assert text(ran.captured) == "%0 = mul(x, y)\n%1 = sigmoid(%0)\n%2 = add(%1, 1)\nreturn %2"
    ran.counts(pointwise=1, mul=0, sigmoid=0, add=0)
    assert text(ran.graph) == (
        "%0 = graphopt.pointwise([x, y], %2 = mul(%0, %1)\n%3 = sigmoid(%2, 1.0)\n%4 = add(%3, 1))\nreturn %0"
    )


def test_branches_meet_and_vectors_broadcast() -> None:
    def forward(m, x, y):
        z = torch.exp(-(x.square()))
        gate = torch.where(z > 0.5, F.leaky_relu(z, 0.2), y.to(torch.float32))
        return torch.maximum(gate * m.v, gate / (1 + x.abs())).pow(2)

    ran = run(PASS, program(forward, v=V), X, Y.half()).counts(pointwise=1)
    assert len(ran.graph.calls) <= 2
    (found,) = programs(ran)
    assert "leaky_relu(%" in found
    assert "where(%" in found


def test_regions_end_at_other_work() -> None:
    def forward(m, x):
        a = torch.tanh(x * 2)
        b = F.linear(a, m.w)
        return torch.exp(b).sin() + x.sum()

    run(PASS, program(forward, w=randn(8, 8)), X).counts(pointwise=2, linear=1, sum=1, tanh=0)


def test_a_cast_in_the_middle() -> None:
    def forward(m, x):
        return (x.float() * 1.5).exp().to(x.dtype)

    ran = run(PASS, program(forward), X.bfloat16()).counts(pointwise=1, to=0)
    assert programs(ran)[0].endswith("%4 = to(%3, bfloat16)")


def test_a_value_that_others_read_is_refused() -> None:
    def forward(m, x):
        y = x * 2
        return torch.exp(y), y

    run(PASS, program(forward), X).refuses("mul is also read by output")


def test_another_size_is_refused() -> None:
    def forward(m, x, v):
        return x * torch.exp(v)

    run(PASS, program(forward), X, V).refuses("exp has another size than mul")


def test_what_has_no_name_is_refused() -> None:
    def forward(m, x):
        return torch.exp(torch.erfinv(x))

    run(PASS, program(forward), X.tanh()).refuses("erfinv.default has no name in a program")


def test_integers_are_refused() -> None:
    def forward(m, x, ids):
        return x * (ids + 1)

    run(PASS, program(forward), X, torch.arange(8).expand(2, 5, 8)).stays()

    def compared(m, x, ids):
        return torch.where(ids > 3, x, 0.0)

    run(PASS, program(compared), X, torch.arange(8).expand(2, 5, 8)).refuses(
        "the operands of gt.Scalar are torch.int64"
    )


def test_mixed_types_are_refused() -> None:
    def forward(m, x, y):
        return torch.exp(x * y)

    run(PASS, program(forward), X, Y.half()).refuses("operands of mul.Tensor are torch.float32 and torch.fl")


def test_options_are_refused() -> None:
    def forward(m, x, y):
        return torch.exp(torch.add(x, y, alpha=2))

    run(PASS, program(forward), X, Y).refuses("add has an option that a program does not name")


def test_dynamic_sizes() -> None:
    def forward(m, x, y):
        return torch.sigmoid(x * y) + m.v

    dynamic = {name: {0: "batch", 1: "seq"} for name in ("x", "y")}
    ran = run(PASS, program(forward, v=V), X, Y, dynamic=dynamic)
    ran.counts(pointwise=1).agrees(randn(3, 2, 8), randn(3, 2, 8, seed=1))


def test_a_size_is_no_operand() -> None:
    def forward(m, x):
        return torch.exp(x / x.shape[0])

    run(PASS, program(forward), X, dynamic={"x": {0: "batch"}}).refuses("div.Tensor reads a size")


def test_onnx_has_the_same_nodes() -> None:
    def forward(m, x, y):
        return torch.sigmoid(x * y) + y

    ran = run(PASS, program(forward), X, Y)
    assert [node.op_type for node in to_onnx(ran.graph).graph] == [
        node.op_type for node in to_onnx(ran.captured).graph
    ]


def test_whole_models_at_level_3() -> None:
    for example in (bert(), llama()):
        run(pipeline(3), example.model, kwargs=example.kwargs, redraw=False)
    assert PASS not in pipeline(2)
