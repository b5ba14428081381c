from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.ir.graph import Graph
from graphopt.ir.pattern import (
    ANY,
    Call,
    Match,
    NearMiss,
    Or,
    Pattern,
    Var,
    argument,
    arguments,
    describe,
    shared_inside,
)
from tests._models import randn

aten = torch.ops.aten
add, mul, sin, cos = aten.add.Tensor, aten.mul.Tensor, aten.sin.default, aten.cos.default
X, Y = randn(3, 4), randn(3, 4, seed=1)


def graph_of(function: Callable[..., Any]) -> Graph:
    """The graph of a function of two tensors x and y: tracing is ten times as fast as capturing a module."""
    traced = make_fx(function, tracing_mode="fake")(X, Y)
    x, y = traced.graph.find_nodes(op="placeholder")
    x._rename("x")
    y._rename("y")
    results = traced.graph.output_node().args[0]
    traced.graph.output_node().args = (tuple(results) if isinstance(results, (tuple, list)) else (results,),)
    leaf = pytree.tree_structure(0)
    return Graph(traced, {}, (), leaf, leaf, x.meta["val"].fake_mode)


def found(pattern: Pattern, function: Callable[..., Any], miss: NearMiss | None = None) -> Match | None:
    """The match of the pattern at the last call of a function's graph."""
    graph = graph_of(function)
    return pattern.match(graph, graph.calls[-1], miss)


def test_what_a_match_binds() -> None:
    pattern = Call(add, Call(sin, Var("a"), name="inner"), Var("b"))
    match = found(pattern, lambda x, y: x.sin() + y)
    assert match is not None
    assert [node.name for node in match.nodes] == ["sin", "add"]
    assert match.root is match.nodes[-1]
    assert (match["a"].name, match["b"].name, match["inner"].name) == ("x", "y", "sin")
    assert match.get("a") is match["a"]
    assert match.get("missing", 7) == 7
    assert [node.name for node in match.inputs] == ["x", "y"]
    assert match.val("a").shape == (3, 4)
    assert match.constant("a") is None


def test_another_op_does_not_match() -> None:
    assert found(Call(add, Var("a"), Var("b")), lambda x, y: x * y) is None
    assert found(Call(sin, Call(cos, Var("a"))), lambda x, y: x.sin().sin()) is None


def test_several_ops_may_be_equivalent() -> None:
    pattern = Call((sin, cos), Var("a"))
    assert found(pattern, lambda x, y: x.sin())
    assert found(pattern, lambda x, y: x.cos())
    assert found(pattern, lambda x, y: x.tan()) is None


def test_one_name_is_one_value() -> None:
    square = Call(mul, Var("a"), Var("a"))
    assert found(square, lambda x, y: x * x)
    assert found(square, lambda x, y: x * y) is None
    scaled = Call(mul, Call(mul, Var("a"), Var("n")), Var("n"))
    assert found(scaled, lambda x, y: x * 2 * 2)
    assert found(scaled, lambda x, y: x * 2 * 3) is None


def test_one_name_is_one_node() -> None:
    pattern = Call(add, Call(sin, ANY, name="s"), Call(sin, ANY, name="s"))

    def once(x, y):
        s = x.sin()
        return s + s

    assert found(pattern, once)
    assert found(pattern, lambda x, y: x.sin() + y.sin()) is None


def test_a_condition() -> None:
    pattern = Call(mul, Var("a"), Var("n", lambda value: value == 2, "a two"))
    assert found(pattern, lambda x, y: x * 2)
    assert found(pattern, lambda x, y: x * 3) is None


def test_a_nameless_variable_binds_nothing() -> None:
    match = found(Call(mul, Var(), Var()), lambda x, y: x * y)
    assert match is not None
    assert match.bindings == {}


def test_commutative() -> None:
    ordered, either = (Call(add, Call(sin, Var("a")), Var("b"), commutative=c) for c in (False, True))
    assert found(ordered, lambda x, y: y + x.sin()) is None
    match = found(either, lambda x, y: y + x.sin())
    assert match is not None
    assert (match["a"].name, match["b"].name) == ("x", "y")
    assert found(either, lambda x, y: x.sin() + y)


def test_commutative_keeps_the_other_arguments() -> None:
    pattern = Call(add, Call(sin, Var("a")), Var("b"), commutative=True)
    assert found(pattern, lambda x, y: torch.add(y, x.sin(), alpha=2)) is None
    doubled = Call(add, Call(sin, Var("a")), Var("b"), alpha=2, commutative=True)
    assert found(doubled, lambda x, y: torch.add(y, x.sin(), alpha=2))


def test_commutative_twice_goes_back_to_the_other_order() -> None:
    """The first order of the inner product fits, and only the outer one shows that it was the wrong one."""
    pattern = Call(add, Call(mul, Var("a"), Var("b"), commutative=True), Call(sin, Var("b")))
    match = found(pattern, lambda x, y: x * y + x.sin())
    assert match is not None
    assert (match["a"].name, match["b"].name) == ("y", "x")


def test_alternatives_in_order() -> None:
    pattern = Or(Call(sin, Var("a"), name="s"), Call((sin, cos), Var("b")))
    match = found(pattern, lambda x, y: x.sin())
    assert match is not None
    assert set(match.bindings) == {"s", "a"}
    match = found(pattern, lambda x, y: x.cos())
    assert match is not None
    assert set(match.bindings) == {"b"}


def test_alternatives_are_gone_back_to() -> None:
    """Each alternative fits on its own; the other argument decides."""
    side = Or(Call(sin, Var("a")), Var("a"))
    match = found(Call(mul, side, Var("a")), lambda x, y: (lambda s: s * s)(x.sin()))
    assert match is not None
    assert match["a"].name == "sin"
    assert [node.name for node in match.nodes] == ["mul"]


def test_bindings_of_a_failed_alternative_are_forgotten() -> None:
    pattern = Or(Call(add, Var("a"), Call(sin, Var("b"))), Call(add, Var("b"), Call(cos, Var("a"))))
    match = found(pattern, lambda x, y: x + y.cos())
    assert match is not None
    assert (match["b"].name, match["a"].name) == ("x", "y")


# Arguments by the schema


def test_an_argument_that_is_not_named_has_its_default() -> None:
    plain = Call(add, Var("a"), Var("b"))
    assert found(plain, lambda x, y: torch.add(x, y, alpha=1))
    assert found(plain, lambda x, y: torch.add(x, y, alpha=2)) is None
    assert found(Call(add, Var("a"), Var("b"), alpha=ANY), lambda x, y: torch.add(x, y, alpha=2))
    assert found(Call(add, Var("a"), Var("b"), alpha=Var("n")), lambda x, y: x + y)
    assert found(Call(aten.gelu.default, Var("a")), lambda x, y: F.gelu(x, approximate="tanh")) is None
    assert found(Call(aten.gelu.default, Var("a")), lambda x, y: F.gelu(x))


def test_a_default_that_is_matched_is_bound() -> None:
    match = found(Call(aten.gelu.default, Var("a"), approximate=Var("how")), lambda x, y: F.gelu(x))
    assert match is not None
    assert match["how"] == "none"


@pytest.mark.parametrize("by_name", [False, True])
def test_an_argument_by_position_or_by_name(by_name: bool) -> None:
    graph = graph_of(lambda x, y: x.sum(1, keepdim=True))
    (node,) = graph.calls
    if by_name:
        node.args, node.kwargs = (node.args[0],), {"dim": node.args[1], "keepdim": True}
    for pattern in (
        Call(aten.sum.dim_IntList, Var("a"), [1], True),
        Call(aten.sum.dim_IntList, Var("a"), dim=[1], keepdim=True),
        Call(aten.sum.dim_IntList, Var("a"), Var("dims"), keepdim=True),
    ):
        assert pattern.match(graph, node)
    assert Call(aten.sum.dim_IntList, Var("a"), [1]).match(graph, node) is None
    assert argument(node, "dim") == [1]
    assert argument(node, "dtype") is None
    assert {name: value for name, (value, _) in arguments(node).items()} == {
        "self": graph.placeholders[0],
        "dim": [1],
        "keepdim": True,
        "dtype": None,
    }


def test_a_required_argument_that_is_not_named_does_not_match() -> None:
    assert found(Call(add, Var("a")), lambda x, y: x + y) is None


def test_lists() -> None:
    pattern = Call(aten.cat.default, [Var("a"), Call(sin, Var("b"))], ANY)
    match = found(pattern, lambda x, y: torch.cat([x, y.sin()], 1))
    assert match is not None
    assert (match["a"].name, match["b"].name) == ("x", "y")
    assert found(pattern, lambda x, y: torch.cat([x, y.sin(), x], 1)) is None
    assert found(pattern, lambda x, y: torch.cat([x, y.cos()], 1)) is None
    assert found(Call(aten.cat.default, Var("all"), 1), lambda x, y: torch.cat([x, y], 1))


def test_literals_are_compared_by_value() -> None:
    pattern = Call(aten.transpose.int, Var("a"), 0, 1)
    assert found(pattern, lambda x, y: x.transpose(0, 1))
    assert found(pattern, lambda x, y: x.transpose(1, 0)) is None


def test_a_call_without_a_schema() -> None:
    graph = graph_of(lambda x, y: x.split(2, dim=1)[1])
    node = graph.calls[-1]
    assert Call(node.target, Call(aten.split.Tensor, Var("a"), 2, 1), 1).match(graph, node)
    assert Call(node.target, ANY, 0).match(graph, node) is None


# What almost matched


def test_a_near_miss_is_the_deepest_one() -> None:
    pattern = Call(add, Call(mul, Call(sin, Var("a")), Var("b")), Var("c"))
    miss = NearMiss()
    assert found(pattern, lambda x, y: x.cos() * y + y, miss) is None
    assert (miss.found.name, miss.expected, len(miss.nodes)) == ("cos", "aten.sin.default", 2)
    assert miss.reason == "near miss: expected aten.sin.default at aten.mul (mul), found aten.cos (cos)"


def test_a_near_miss_of_a_condition_says_it_in_words() -> None:
    miss = NearMiss()
    pattern = Call(add, Call(sin, Var("a", lambda value: False, "a weight")), Var("b"))
    assert found(pattern, lambda x, y: x.sin() + y, miss) is None
    assert (miss.found.name, miss.expected) == ("x", "a weight")


def test_a_near_miss_of_a_literal_says_what_it_is() -> None:
    miss = NearMiss()
    pattern = Call(add, Call(torch.ops.aten.pow.Tensor_Scalar, Var("a"), 2), Var("b"))
    assert found(pattern, lambda x, y: x**3 + y, miss) is None
    assert "expected 2 at aten.pow (pow_1), found 3" in miss.reason


def test_a_near_miss_of_another_value_names_the_first() -> None:
    miss = NearMiss()
    assert found(Call(mul, Var("a"), Var("a")), lambda x, y: x * y, miss) is None
    assert miss.expected == "the same value as a"


def test_a_match_leaves_no_near_miss() -> None:
    miss = NearMiss()
    assert found(Call(mul, Var("a"), Var("b")), lambda x, y: x * y, miss)
    assert miss.nodes == ()


# Values that others read


def sums(pattern: Pattern, function: Callable[..., Any]) -> Match:
    graph = graph_of(function)
    (node,) = (node for node in graph.calls if node.target is add)
    match = pattern.match(graph, node)
    assert match is not None
    return match


def test_a_value_that_is_read_outside() -> None:
    pattern = Call(add, Call(sin, Var("a"), name="s"), Call(cos, Var("a"), name="c"))

    def leaking(x, y):
        s = x.sin()
        return s + x.cos(), s.tan()

    match = sums(pattern, leaking)
    shared = shared_inside(match)
    assert shared is not None
    assert [describe(node) for node in shared] == ["aten.sin (sin)", "aten.tan (tan)"]
    assert shared_inside(match, [match["s"]]) is None
    assert shared_inside(sums(pattern, lambda x, y: (x.sin() + x.cos(), x))) is None


def test_a_result_may_be_read_by_anybody() -> None:
    def doubled(x, y):
        total = x.sin() + y
        return total, total.tan()

    assert shared_inside(sums(Call(add, Call(sin, ANY), ANY), doubled)) is None
