"""Values in one block: the same bits, nothing returned lies in it, threads have one each."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch.nn import functional as F

from graphopt.capture.export import capture
from graphopt.runtime import arena
from graphopt.runtime.arena import Arena, into, planned
from graphopt.runtime.executors.eager import Eager
from graphopt.runtime.region import extract
from graphopt.runtime.target import Target
from tests._programs import load, programs
from tests.runtime.test_memory import graph_of

X = torch.randn(3, 5, 8)
W, B = torch.randn(16, 8), torch.randn(16)

FORMULAS: dict[str, Callable[..., torch.Tensor]] = {
    "pointwise": lambda x: (F.gelu(x * 2.0 + 1.0).tanh() / 3.0).sum(0),
    "linear": lambda x: F.linear(F.gelu(F.linear(x, W, B)), W.t().contiguous()).sum(0),
    "linear of a strided input": lambda x: F.linear(x.exp().transpose(0, 1), W, B).sum(0),
    "matmul": lambda x: (x.sin() @ x.cos().transpose(1, 2)).softmax(-1).sum(0),
    "cat": lambda x: torch.cat([x.sin(), x.cos()], 1).exp().sum(0),
    "reductions": lambda x: (x.sin().sum(-1, keepdim=True) + x.cos().mean(1, keepdim=True)).sum(0),
    "types": lambda x: ((x.sin() > 0.5).to(torch.int64) + 1).sum(0),
    "a size that depends on values": lambda x: (
        torch.ops.graphopt.pack_tokens(x, (x[:, :, 0] > 0).reshape(-1).nonzero().squeeze(1)).exp().sum(1)
    ),
    "nothing to plan": lambda x: x.sin(),
    "empty": lambda x: torch.cat([x[:, :0].sin(), x[:, :0].cos()], 1).exp().sum(0),
}


@pytest.mark.parametrize("label", FORMULAS)
def test_the_bits_are_those_of_the_graph_itself(label: str) -> None:
    graph = graph_of(FORMULAS[label], X)
    held = Arena(graph, planned(graph))
    for seed in range(3):
        x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        (wanted,), (found,) = graph.module.forward(x), held.run([x])
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()


def test_products_and_pointwise_calls_are_planned() -> None:
    graph = graph_of(FORMULAS["linear"], X)
    assert [value.node.name for value in planned(graph)] == ["linear", "gelu", "linear_1"]
    assert planned(graph)[1].instead_of == "linear"


def test_forms_that_compute_elsewhere_and_copy_are_left_out() -> None:
    graph = graph_of(lambda x: F.layer_norm(F.embedding(x, torch.randn(7, 8)), (8,)).sum(0), torch.arange(6))
    assert [node.name for node in graph.calls if into(node)] == ["sum_1"]


def test_what_is_returned_does_not_change_with_the_next_call() -> None:
    graph = graph_of(lambda x: (x.sin().exp(), x.cos().view(-1), x.tanh().sum(0)), X)
    held = Arena(graph, planned(graph))
    first = held.run([X])
    kept = [value.clone() for value in first]
    held.run([X + 1.0])
    assert all(torch.equal(now, then) for now, then in zip(first, kept, strict=True))


def test_the_block_follows_the_shapes_of_a_call() -> None:
    graph = graph_of(FORMULAS["cat"], X, dynamic=True)
    held = Arena(graph, planned(graph))
    for batch in (*range(1, 3 + arena._SHAPES), 2):
        x = torch.randn(batch, 5, 8)
        assert torch.equal(held.run([x])[0], graph.module.forward(x)[0])
    assert len(held.layouts) == len(held._free) == arena._SHAPES
    sizes = [layout.bytes for layout in held.layouts.values()]
    assert held.describe()["block_bytes"] == sum(sizes) and len(set(sizes)) > 1


def test_calls_at_the_same_time_have_a_block_each() -> None:
    graph = graph_of(FORMULAS["matmul"], X)
    held = Arena(graph, planned(graph))
    given_inputs = [torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    wanted = [graph.module.forward(x)[0] for x in given_inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(50):
            with torch.no_grad():
                if not torch.equal(held.run([given_inputs[index]])[0], wanted[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(len(free) <= 4 for free in held._free.values())


def test_a_call_that_fails_gives_its_block_back() -> None:
    graph = graph_of(lambda x: F.embedding(x.abs(), W).exp().sum(0), torch.arange(6))
    held = Arena(graph, planned(graph))
    for _ in range(3):
        with pytest.raises(IndexError):
            held.run([torch.full((6,), 99)])
    assert [len(free) for free in held._free.values()] == [1]


def test_the_executor_plans_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(FORMULAS["pointwise"], X)
    region = extract(graph, graph.calls, "region0")
    cpu = Target(torch.device("cpu"))
    assert Eager().compile(region, cpu, "fast").describe() == {}
    monkeypatch.setattr(arena, "_WORTH_PLANNING", 0)
    program = Eager().compile(region, cpu, "fast")
    assert torch.equal(program.run([X])[0], graph.module.forward(X)[0])
    found = program.describe()
    assert found["block_values"] > 2
    assert found["block_bytes"] == found["block_bytes_needed"] == 512  # one place for the whole chain


@settings(max_examples=25, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(source=programs())
def test_random_programs_keep_their_bits(source: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    module = load(source, tmp_path_factory.mktemp("program"))
    inputs = module.inputs(3, 5, 0)
    graph = capture(module.Program().eval(), inputs, dynamic=module.DYNAMIC)
    held = Arena(graph, planned(graph))
    with torch.no_grad():
        wanted, found = graph.module.forward(*inputs), held.run(inputs)
    for left, right in zip(wanted, found, strict=True):
        same = (left == right) | (left.isnan() & right.isnan()) if left.is_floating_point() else left == right
        assert same.all()
