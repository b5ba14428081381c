"""A projection and the norm after it as one op, for the cuda executor alone."""

from __future__ import annotations

import operator

import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.device import GPUS
from graphopt.compiler.evaluate import outputs
from graphopt.compiler.manager import PassManager
from graphopt.compiler.remarks import Remarks
from graphopt.ir import provenance
from graphopt.ir.graph import Graph
from graphopt.kernels.float8_linear import OP as FLOAT8_LINEAR
from graphopt.kernels.quantize_rows import OP as QUANTIZE_ROWS
from graphopt.passes import fuse_add_layer_norm
from graphopt.runtime.joining import joined
from tests._models import randn, randomised

X = randn(2, 5, 8)


class Block(nn.Module):
    """The end of a block: projection, residual, norm."""

    def __init__(self, swapped: bool = False, read_twice: bool = False) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.swapped, self.read_twice = swapped, read_twice

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.project(torch.tanh(x))
        out = self.norm(x + y if self.swapped else y + x)
        return (out, y) if self.read_twice else (out,)


def fused(model: nn.Module) -> Graph:
    graph = capture(randomised(model), (X,))
    return PassManager([fuse_add_layer_norm.PASS], Remarks(), GPUS["h100"]).run(graph, [X]).graph


def test_it_is_one_op_with_the_same_result_name_and_place() -> None:
    for swapped in (False, True):
        graph = fused(Block(swapped))
        copy = joined(graph)
        assert graph.op_counts()["graphopt.add_layer_norm"] == 1
        assert copy.op_counts()["graphopt.linear_add_layer_norm"] == 1
        assert "aten.linear" not in copy.op_counts()
        (before,) = (node for node in graph.calls if "layer_norm" in str(node.target))
        (after,) = (node for node in copy.calls if "layer_norm" in str(node.target))
        assert after.name == before.name
        assert provenance.of(after).source == provenance.of(before).source
        assert len(provenance.of(after).origins) > len(provenance.of(before).origins)
        copy.check()
        torch.testing.assert_close(outputs(copy, [X]), outputs(graph, [X]))


def test_a_projection_that_is_also_read_elsewhere_stays() -> None:
    graph = fused(Block(read_twice=True))
    assert joined(graph).op_counts() == graph.op_counts()


def test_types_that_the_op_does_not_take_together_stay_apart() -> None:
    graph = fused(Block())
    for node in graph.nodes:
        if node.op == "get_attr" and "norm" in str(node.target):
            node.meta["val"] = node.meta["val"].double()
    copy = joined(graph)
    assert copy.op_counts() == graph.op_counts()


def quantized(graph: Graph, times: int = 1) -> Graph:
    """The graph with its norm's result quantized, and multiplied as often by one weight."""
    weight, scale = QUANTIZE_ROWS(randn(16, 8))
    (normed,) = graph.output.args[0]
    place = provenance.of(normed)
    with graph.fx.inserting_before(graph.output):
        named = (graph.add_constant(v, ["norm.weight"], "made up") for v in (weight, scale.squeeze(1)))
        constants = [graph.get_constant(name, place) for name in named]
        ends = []
        for _ in range(times):
            rows = graph.call(QUANTIZE_ROWS.overload, (normed,), {}, place)
            parts = [graph.call(operator.getitem, (rows, i), {}, place) for i in range(2)]
            args = (*parts, *constants, torch.float32)
            ends.append(graph.call(FLOAT8_LINEAR.overload, args, {}, place))
    graph.output.args = ([normed, *ends],)
    graph.module.recompile()
    return graph


def test_a_norm_makes_its_codes_rather_than_join_its_projection() -> None:
    graph = quantized(fused(Block()))
    copy = joined(graph)
    copy.check()
    counts = copy.op_counts()
    assert counts["graphopt.add_layer_norm_quantize"] == counts["aten.linear"] == 1
    assert not {"graphopt.quantize_rows", "graphopt.add_layer_norm"} & counts.keys()
    (after,) = (node for node in copy.calls if "layer_norm" in str(node.target))
    (before,) = (node for node in graph.calls if "layer_norm" in str(node.target))
    assert after.name == before.name
    torch.testing.assert_close(outputs(copy, [X]), outputs(graph, [X]), rtol=1e-5, atol=1e-5)


def test_a_norm_that_is_quantized_twice_keeps_the_second() -> None:
    """Which ``merge_common_subexpressions`` has taken away already, in a graph of ``optimize``."""
    graph = quantized(fused(Block()), times=2)
    copy = joined(graph)
    copy.check()
    assert copy.op_counts()["graphopt.quantize_rows"] == 1
    torch.testing.assert_close(outputs(copy, [X]), outputs(graph, [X]), rtol=1e-5, atol=1e-5)
