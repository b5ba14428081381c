from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.capture.export import capture
from graphopt.ir import provenance
from graphopt.ir.graph import (
    Constant,
    Graph,
    has_effect,
    is_getitem,
    is_symbolic,
    op_name,
    same_shape,
    same_size,
    size_hint,
    tensor_bytes,
    users_outside,
    value,
)
from tests._models import randn

aten = torch.ops.aten
X = randn(3, 4)


class Program(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.fc(x).split(3, dim=1)
        return (low.sin() + high.cos()).exp(), low.sin()


class Sizes(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0] * x.shape[1], -1).sum() + y.sum()


@pytest.fixture(scope="module")
def captured() -> Graph:
    return capture(Program().eval(), (X,))


@pytest.fixture
def graph(captured: Graph) -> Graph:
    return captured.clone()


@pytest.fixture(scope="module")
def sizes() -> Graph:
    dynamic = {"x": {0: "batch", 1: "seq"}, "y": {0: "batch", 1: "other"}}
    return capture(Sizes().eval(), (randn(3, 5, 2), randn(3, 7)), dynamic=dynamic)


def run(graph: Graph) -> list[torch.Tensor]:
    graph.module.recompile()
    with torch.no_grad():
        return list(graph.module(X))


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_what_it_lists(graph: Graph) -> None:
    assert [node.name for node in graph.placeholders] == ["x"]
    assert graph.output.op == "output"
    assert all(node.op == "call_function" for node in graph.calls)
    assert graph.nodes == list(graph.fx.nodes)
    graph.check()


def test_op_counts_come_most_frequent_first(graph: Graph) -> None:
    counts = graph.op_counts()
    assert counts == {
        "getitem": 2,
        "aten.sin": 2,
        "aten.linear": 1,
        "aten.split": 1,
        "aten.cos": 1,
        "aten.add": 1,
        "aten.exp": 1,
    }
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_ops_by_name(graph: Graph) -> None:
    names = {node.name: op_name(node) for node in graph.calls}
    assert names["linear"] == "aten.linear"
    getitems = [node for node in graph.calls if is_getitem(node)]
    assert [op_name(node) for node in getitems] == ["getitem", "getitem"]


# Copies


def test_a_clone_is_independent(graph: Graph) -> None:
    before, names = run(graph), [node.name for node in graph.nodes]
    copy = graph.clone()
    assert [node.name for node in copy.nodes] == names
    (linear,) = (node for node in copy.calls if node.target is aten.linear.default)
    with copy.fx.inserting_after(linear):
        neg = copy.call(aten.neg.default, (linear,), {}, provenance.of(linear))
    linear.replace_all_uses_with(neg, delete_user_cb=lambda user: user is not neg)
    copy.add_constant(randn(2), ["fc.weight"], "cut")
    assert not equal(run(copy), before)
    assert equal(run(graph), before)
    assert [node.name for node in graph.nodes] == names
    assert all(not constant.how for constant in graph.constants.values())


def test_rewriting_the_original_leaves_the_clone(graph: Graph) -> None:
    before, copy = run(graph), graph.clone()
    (exp,) = (node for node in graph.calls if node.target is aten.exp.default)
    exp.target = aten.neg.default
    exp.meta["val"] = None
    assert equal(run(copy), before)
    assert all("val" in node.meta and node.meta["val"] is not None for node in copy.calls)


def test_a_clone_shares_weights_and_keeps_provenance(graph: Graph) -> None:
    copy = graph.clone()
    for name, constant in graph.constants.items():
        assert copy.constants[name].tensor.data_ptr() == constant.tensor.data_ptr()
    pairs = list(zip(graph.calls, copy.calls, strict=True))
    assert all(provenance.of(old) == provenance.of(new) for old, new in pairs)
    assert all(old.meta is not new.meta for old, new in pairs)
    assert (copy.inputs, copy.in_spec, copy.out_spec) == (graph.inputs, graph.in_spec, graph.out_spec)


# Order


@pytest.mark.parametrize("seed", range(5))
def test_sort_restores_order_from_any_disorder(graph: Graph, seed: int) -> None:
    before = run(graph)
    calls = graph.calls
    random.Random(seed).shuffle(calls)
    for node in calls:
        graph.output.prepend(node)
    graph.sort()
    graph.check()
    assert equal(run(graph), before)


def test_sort_moves_only_what_must_move(graph: Graph) -> None:
    names = [node.name for node in graph.nodes]
    graph.sort()
    assert [node.name for node in graph.nodes] == names
    (add,) = (node for node in graph.calls if node.target is aten.add.Tensor)
    (linear,) = (node for node in graph.calls if node.target is aten.linear.default)
    linear.prepend(add)
    graph.sort()
    graph.check()
    moved = [name for name in names if name != add.name]
    assert [node.name for node in graph.nodes if node is not add] == moved


def test_check_finds_disorder_and_missing_values(graph: Graph) -> None:
    (linear,) = (node for node in graph.calls if node.target is aten.linear.default)
    del linear.meta["val"]
    with pytest.raises(RuntimeError, match="node linear has no value"):
        graph.check()
    graph.output.prepend(linear)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        graph.check()


# What goes


def test_erase_dead_takes_chains_and_nothing_that_is_read(graph: Graph) -> None:
    first, second = graph.output.args[0]
    graph.output.args = ((second,),)
    erased = graph.erase_dead([first])
    assert set(erased) == {"exp", "add", "cos", "sin", "getitem_1"}
    assert graph.erase_dead([second, *graph.placeholders, graph.output]) == []
    graph.check()
    assert len(run(graph)) == 1


def test_erase_dead_takes_a_node_that_is_given_twice(graph: Graph) -> None:
    first, second = graph.output.args[0]
    graph.output.args = ((second,),)
    assert len(graph.erase_dead([first, first])) == 5


def test_what_has_an_effect_is_not_erased() -> None:
    class Checked(nn.Module):
        def forward(self, n: torch.Tensor) -> torch.Tensor:
            size = n.item()
            torch._check(size >= 2)
            return n + 1

    graph = capture(Checked().eval(), (torch.tensor(3),))
    effects = [node for node in graph.calls if has_effect(node)]
    assert effects
    assert graph.erase_dead(effects) == []
    assert {node.name for node in effects} <= set(graph.erase_dead(effects, proved=effects))
    graph.check()


def test_unused_constants_are_dropped(graph: Graph) -> None:
    graph.add_constant(randn(2), ["fc.weight"], "cut")
    graph.drop_unused_constants()
    assert set(graph.constants) == {"p_fc_weight", "p_fc_bias"}
    assert {name for name, _ in graph.module.named_buffers()} == set(graph.constants)


# Constants


def test_constants_keep_what_they_are_made_from(graph: Graph) -> None:
    one = graph.add_constant(randn(2), ["a", "b", "a"], "stacked")
    two = graph.add_constant(randn(2), [], "made")
    assert one != two
    assert graph.constants[one].sources == ("a", "b")
    with graph.fx.inserting_before(graph.calls[0]):
        node = graph.get_constant(one, provenance.of(graph.calls[0]))
    assert graph.constant(node) is graph.constants[one].tensor
    assert node.meta["val"].shape == (2,)
    assert graph.constant(graph.calls[0]) is None
    assert graph.constant(3) is None


def test_a_constant_that_is_taken_gets_another_name(graph: Graph) -> None:
    graph.set_constant(f"_folded_{len(graph.constants) + 1}", Constant(randn(2), ()))
    assert graph.add_constant(randn(2), [], "") == f"_folded_{len(graph.constants) - 1}_"


def test_calls_infer_their_values(graph: Graph) -> None:
    (linear,) = (node for node in graph.calls if node.target is aten.linear.default)
    with graph.fx.inserting_after(linear):
        both = graph.call(aten.split.Tensor, (linear, 2, 1), {}, provenance.of(linear))
    assert [part.shape for part in both.meta["val"]] == [(3, 2)] * 3
    with pytest.raises(RuntimeError, match="shape"):
        graph.call(aten.reshape.default, (linear, [5, 5]), {}, provenance.of(linear))


def test_a_size_that_depends_on_values_is_not_left_for_the_next_trace_to_bind(graph: Graph) -> None:
    (linear,) = (node for node in graph.calls if node.target is aten.linear.default)
    with graph.fx.inserting_after(linear):
        where = graph.call(aten.nonzero.default, (linear,), {}, provenance.of(linear))
    assert isinstance(where.meta["val"].shape[0], torch.SymInt)
    assert not shape_env(graph).pending_fresh_unbacked_symbols


def test_users_outside(graph: Graph) -> None:
    (split,) = (node for node in graph.calls if node.target is aten.split.Tensor)
    low, high = split.users
    assert list(users_outside(split, [low])) == [high]
    assert list(users_outside(split, [low, high])) == []


# Sizes


def shape_env(graph: Graph) -> ShapeEnv:
    env = graph.fake_mode.shape_env
    assert env is not None
    return env


def test_same_size_knows_equal_names_and_adds_no_guard(sizes: Graph) -> None:
    (batch, seq, _), (same, other) = (node.meta["val"].shape for node in sizes.placeholders)
    guards = len(shape_env(sizes).guards)
    assert same_size(batch, same)
    assert not same_size(batch, seq)
    assert not same_size(seq, other)
    assert not same_size(batch, 3)  # true of the example, not of every input
    assert same_size(seq * 2, seq + seq)
    assert same_size(4, 4)
    assert not same_size(4, 5)
    assert same_shape((batch, 2), (same, 2))
    assert not same_shape((batch, 2), (same, 2, 1))
    assert not same_shape((batch, seq), (same, other))
    assert len(shape_env(sizes).guards) == guards


def test_sizes_and_values(sizes: Graph) -> None:
    x, y = sizes.placeholders
    assert tensor_bytes(x.meta["val"]) == 4 * 3 * 5 * 2
    assert tensor_bytes((x.meta["val"], [y.meta["val"], 3])) == 4 * (30 + 21)
    assert [size_hint(size) for size in x.meta["val"].shape] == [3, 5, 2]
    assert value(x) is x.meta["val"]
    assert value(3) == 3
    symbolic = [node for node in sizes.calls if is_symbolic(node)]
    assert symbolic
    assert all(op_name(node) in ("aten.sym_size", "mul") for node in symbolic)
