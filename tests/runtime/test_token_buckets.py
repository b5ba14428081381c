"""Packed tokens in buckets: as exact as without, graphs by bucket, and rows of no token that nobody reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from graphopt.capture.export import capture_any
from graphopt.compiler.device import GPUS
from graphopt.compiler.manager import PassManager
from graphopt.compiler.reference import output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import LoweringError
from graphopt.ir.graph import Graph
from graphopt.packing import remove_padding, zero_padding
from graphopt.passes.default import pipeline
from graphopt.runtime import choosing, scheduler
from graphopt.runtime import tokens as counting
from graphopt.runtime.candidates import Candidate
from graphopt.runtime.executors import EXECUTORS, absent
from graphopt.runtime.executors.cuda import Cuda, CudaProgram, uncapturable
from graphopt.runtime.plan import Padded, Plan, Step, ends_of
from graphopt.runtime.region import Region, extract
from graphopt.runtime.target import Target
from graphopt.runtime.token_buckets import bucket_of, fix_sizes, mark, varying_sizes
from graphopt.runtime.ways import plan_packed
from tests._models import minilm, padding, tokens
from tests.runtime._graphs import StandIn, stand_in
from tests.test_padding import First, roberta

__all__ = ["stand_in"]
CPU = torch.device("cpu")
BATCH, SEQ = 4, 24
nonzero = torch.ops.aten.nonzero.default

MODELS: dict[str, Callable[[], nn.Module]] = {
    "all states": roberta,
    "their mean": lambda: minilm().model,
    "the first": lambda: First().eval(),
}
SECOND = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 2  # every second position, the first ones besides
MASKS = {
    "the example": padding((24, 3, 9, 15), SEQ),  # 51 tokens, in 64
    "as many": padding((3, 24, 15, 9), SEQ),
    "one a sequence": padding((1,) * BATCH, SEQ),
    "holes": SECOND | (torch.arange(SEQ) == 0),
    "a full bucket": padding((24, 24, 15, 1), SEQ),
    "all but one": padding((24, 24, 24, 23), SEQ),  # in 96, which is all of the batch
    "full": torch.ones(BATCH, SEQ, dtype=torch.long),
}


def call(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(*mask.shape, seed=2), "attention_mask": mask}


@functools.cache
def packed(name: str, lengths: tuple[int, ...] = (24, 3, 9, 15), seq: int = SEQ) -> Graph:
    """A model that computes real tokens only, on batches of a size."""
    graph, inputs = capture_any(MODELS[name](), (), call(padding(lengths, seq)))
    rewritten = PassManager(pipeline(2, (), ()), Remarks(), GPUS["h100"]).run(graph, inputs).graph
    zero_padding((rewritten,), Remarks())
    found = remove_padding(rewritten, inputs, Remarks(), GPUS["h100"])
    assert found is not None
    return found.graph


def whole(graph: Graph) -> Region:
    return extract(graph, graph.calls, "region0")


def given(graph: Graph, mask: torch.Tensor) -> list[torch.Tensor]:
    return [call(mask)[node.name] for node in graph.placeholders]


def results(graph: Graph, program: CudaProgram, mask: torch.Tensor) -> list[torch.Tensor]:
    """What the model returns, computed by a program of the whole of it."""
    region = whole(graph)
    made = dict(zip(region.writes, program.run([call(mask)[name] for name in region.reads]), strict=True))
    return [made[node.name] for node in graph.output.args[0]]  # type: ignore[union-attr]


def test_buckets_waste_little_and_grow_with_the_tokens() -> None:
    most = 65536
    buckets = [bucket_of(n, most) for n in range(most + 1)]
    assert buckets == sorted(buckets)
    assert all(bucket >= max(n, 1) for n, bucket in enumerate(buckets))
    assert all(bucket - n < max(64, n / 31) for n, bucket in enumerate(buckets) if n)
    assert {bucket % 64 for bucket in buckets} == {0}
    assert len({bucket for bucket in buckets if 4096 < bucket <= 8192}) == 32
    assert bucket_of(8850, 32 * 512) == 8960


def test_a_bucket_is_never_more_than_the_batch() -> None:
    assert [bucket_of(n, 70) for n in (0, 1, 64, 65, 70)] == [64, 64, 64, 70, 70]
    assert bucket_of(3, 5) == 5
    assert bucket_of(0, 0) == 0


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's implementations alone: Triton's interpreter takes seconds for a model."""
    everything = choosing.implementations
    monkeypatch.setattr(choosing, "implementations", lambda *call: (everything(*call)[0][-1:], {}))


@pytest.mark.usefixtures("stand_in", "plain")
@pytest.mark.parametrize("name", MODELS)
def test_every_call_is_exact_in_the_graph_of_its_bucket(name: str) -> None:
    graph = packed(name)
    program = CudaProgram(whole(graph), CPU, timed=False)
    for mask in MASKS.values():
        found = results(graph, program, mask)
        verdict = output_reference(graph, given(graph, mask), MODEL_FLOOR_ULPS).compare(found)
        assert verdict.ok, verdict.reason
    assert program.describe()["token_buckets"] == [64, 96]
    assert [made.replays for made in StandIn.last.made] == [5, 1]
    assert program.describe()["graphed_nodes"] == len(graph.calls)


class Spoilt(fx.Interpreter):
    """Runs what a graph was captured of, every row of no token overwritten as soon as it is there."""

    def __init__(self, module: fx.GraphModule, tokens: int) -> None:
        super().__init__(module)
        self.real = tokens
        self.spoilt: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        vals, made = (x if isinstance(x, list | tuple) else (x,) for x in (n.meta["val"], result))
        for val, x in zip(vals, made, strict=True):
            at = [dim for dim, size in enumerate(val.shape) if isinstance(size, torch.SymInt)]
            if at and x.is_floating_point():
                x.narrow(at[0], self.real, x.shape[at[0]] - self.real).fill_(math.nan)
                self.spoilt.append(n.name)
        return result


@pytest.mark.usefixtures("stand_in", "plain")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("label", ["the example", "one a sequence", "all but one"])
def test_rows_of_no_token_are_read_by_nobody(name: str, label: str) -> None:
    """NaN in all of them, behind every node, changes no bit of what the model returns."""
    assert_nobody_reads_them(packed(name), MASKS[label])


@pytest.mark.usefixtures("stand_in")
def test_rows_of_no_token_are_read_by_no_kernel() -> None:
    assert_nobody_reads_them(packed("all states", (6, 3), 6), padding((4, 1), 6))


def assert_nobody_reads_them(graph: Graph, mask: torch.Tensor) -> None:
    region = whole(graph)
    program = CudaProgram(region, CPU, timed=False)
    inputs = [call(mask)[key] for key in region.reads]
    module = program._graphed.function(inputs, (bucket_of(int(mask.sum()), mask.numel()),))
    assert isinstance(module, fx.GraphModule)
    spoilt = Spoilt(module, int(mask.sum()))
    with torch.no_grad():
        expected = module(*inputs)
        found = spoilt.run(*inputs)
    assert len(spoilt.spoilt) > 5
    assert all(value.isfinite().all() for value in expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("stand_in", "plain")
def test_the_mask_is_counted_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By who chooses the plan, and who chooses the graph of it."""
    graph = packed("the first")
    region = whole(graph)
    outputs, constants = ends_of(graph)
    names = tuple(node.name for node in graph.placeholders)
    step = Step("cuda", region, CudaProgram(region, CPU, timed=False))
    plan = Plan(CPU, names, outputs, constants, (step,))
    both = replace(plan, padded=Padded(plan, "attention_mask", 0.9, True))
    counted = []
    real = counting._count
    monkeypatch.setattr(counting, "_count", lambda mask: counted.append(mask) or real(mask))
    for turn in range(1, 4):
        scheduler.run(both, given(graph, MASKS["holes"]))
        assert len(counted) == turn


@pytest.mark.parametrize("name", MODELS)
def test_the_executor_takes_all_of_a_packed_graph(name: str) -> None:
    graph = packed(name)
    assert [reason for node in graph.calls if (reason := uncapturable(node, CPU))] == []
    assert varying_sizes(graph.calls[-1]) is None


def test_what_is_not_proved_is_refused_with_the_reason() -> None:
    graph = packed("their mean").clone()
    (node,) = graph.fx.find_nodes(op="call_function", target=nonzero)
    assert uncapturable(node, CPU) is None
    mark(node, "sum (sum_9) reads rows of no token")
    reason = "aten.nonzero gives depends on values; sum (sum_9) reads rows of no token"
    assert reason in str(uncapturable(node, CPU))
    assert all("depends on values" in str(varying_sizes(user)) for user in node.users)
    del node.meta["graphopt_spare_rows"]
    assert varying_sizes(node) == "depends on values"


def test_a_mask_that_is_computed_has_no_size_beforehand() -> None:
    graph = packed("their mean").clone()
    (node,) = graph.fx.find_nodes(op="call_function", target=nonzero)
    (flat,) = node.all_input_nodes
    with graph.fx.inserting_before(node):
        negated = graph.fx.call_function(torch.ops.aten.logical_not.default, (flat,))
    negated.meta = dict(flat.meta)
    node.args = (negated,)
    with pytest.raises(LoweringError, match=f"the mask of {node.name} is computed inside the region"):
        fix_sizes(graph.clone())
    mark(node, None)
    assert varying_sizes(node) == "depends on values; its mask is computed, not given"


@pytest.mark.usefixtures("stand_in", "plain")
def test_a_flat_mask_from_another_region_will_do() -> None:
    graph = packed("their mean")
    (node,) = graph.fx.find_nodes(op="call_function", target=nonzero)
    (flat,) = node.all_input_nodes
    behind = [n for n in graph.calls if n is not flat and flat not in n.users and n is not flat.args[0]]
    ahead = [n for n in graph.calls if n not in behind]
    before, after = (extract(graph, nodes, "part") for nodes in (ahead, behind))
    values: dict[str, Any] = call(MASKS["the example"])
    for region, run in ((before, before.graph.module.forward), (after, None)):
        inputs = [values[name] for name in region.reads]
        made = run(*inputs) if run is not None else CudaProgram(region, CPU, timed=False).run(inputs)
        values.update(zip(region.writes, made, strict=True))
    expected = graph.module.forward(*given(graph, MASKS["the example"]))
    ends: Sequence[Any] = graph.output.args[0]  # type: ignore[assignment]
    for end, value in zip(ends, expected, strict=True):
        torch.testing.assert_close(values[end.name], value)
    assert len(StandIn.last.made) == 1


def test_executors_that_cannot_run_packed_tokens_leave_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Cuda, node: fx.Node, target: Target) -> str | None:
        return "not today" if node.target is nonzero else None

    monkeypatch.setattr(Cuda, "supports", refuse)
    remarks = Remarks()
    (found,) = plan_packed(packed("their mean"), ("cuda",), Target(CPU), remarks)
    assert isinstance(found, Candidate)
    assert found.plan is None
    assert found.name == "cuda, padding removed"
    assert any("was dropped: no executor runs aten.nonzero" in row.reason for row in remarks.rows)


@pytest.mark.openvino
@pytest.mark.skipif(absent(EXECUTORS["openvino"], Target(CPU)) is not None, reason="OpenVINO is not here")
def test_on_a_cpu_openvino_is_a_way_to_run_packed_tokens() -> None:
    graph = packed("their mean")
    own, other = plan_packed(graph, None, Target(CPU), Remarks())
    assert (own.name, other.name) == ("ort, padding removed", "openvino, padding removed")
    assert other.plan is None
    other.make()
    assert other.plan is not None
    inputs = given(graph, MASKS["the example"])
    wanted = graph.module.forward(*inputs)
    for got, value in zip(scheduler.run(other.plan, inputs), wanted, strict=True):
        torch.testing.assert_close(got, value)
