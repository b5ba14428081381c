from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

import graphopt
from graphopt.capture.export import capture
from graphopt.compiler.manager import PassManager
from graphopt.compiler.remarks import Remarks
from graphopt.ir.graph import Graph, has_effect
from graphopt.ir.provenance import KEY
from graphopt.passes.prune_asserts import PASS
from graphopt.passes.remove_dead_code import PASS as REMOVE_DEAD_CODE
from tests._models import randn
from tests.passes._harness import LIMITS, Ran, program, rerun, run, text

aten = torch.ops.aten

X = randn(4, 5)
TABLE = torch.tensor([1, 2, 3])


def effects(graph: Graph) -> int:
    return sum(has_effect(node) for node in graph.calls)


def asserted(target: Any, *args: Any, kwargs: dict[str, Any] | None = None) -> Ran:
    """A program that asserts something of literals."""

    def forward(m, x):
        return x.sin()

    model = program(forward)
    graph = capture(model, (X,))
    with graph.fx.inserting_before(graph.calls[0]):
        graph.call(target, args, kwargs or {}, graph.calls[0].meta[KEY])
    return rerun([PASS], model, graph, [X])


def test_a_range_of_a_constant_goes_with_what_only_it_reads() -> None:
    def forward(m, x):
        count = m.table.max().item()
        torch._check(count >= 2)
        torch._check(count < 9)
        return x * m.table.sum()

    run(PASS, program(forward, table=TABLE), X, redraw=False).becomes(
        """
        %0 = sum(table)
        %1 = mul(x, %0)
        return %1
        """,
        before="""
        %0 = max(table)
        %1 = item(%0)
        %2 = ge(%1, 2)
        %3 = _assert_scalar(%2, Runtime assertion failed for expression u0 >= 2 on node 'ge_1')
        %4 = le(%1, 8)
        %5 = _assert_scalar(%4, Runtime assertion failed for expression u0 <= 8 on node 'le_1')
        %6 = lt(%1, 9)
        %7 = _assert_scalar(%6, Runtime assertion failed for expression u0 < 9 on node 'lt_1')
        %8 = sum(table)
        %9 = mul(x, %8)
        return %9
        """,
    )


def test_a_number_that_is_read_elsewhere_stays() -> None:
    def forward(m, x):
        first, second, third = m.table.tolist()
        torch._check(first + second == third)
        return x * first

    ran = run(PASS, program(forward, table=TABLE), X, redraw=False)
    ran.counts(_assert_scalar=0, item=1, mul=1)
    assert ran.kept == {PASS.name: 1}


def test_a_tensor_that_is_true() -> None:
    def forward(m, x):
        aten._assert_async.default((m.table > 0).all())
        aten._assert_async.msg(m.table.sum() == 6, "they must make six")
        return x * 2

    ran = run(PASS, program(forward, table=TABLE), X, redraw=False)
    ran.becomes("%0 = mul(x, 2)\nreturn %0")
    assert ran.kept == {PASS.name: 2}
    assert ran.graph.constants == {}


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten._assert_scalar.default, (True, "must hold"), {}),
        (aten._assert_scalar.default, (7, "must not be zero"), {}),
        (aten.sym_constrain_range.default, (3,), {"min": 2, "max": 3}),
        (aten.sym_constrain_range.default, (-3,), {}),
        (aten.sym_constrain_range_for_size.default, (3,), {"min": 3}),
    ],
)
def test_literals_that_hold(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asserted(target, *args, kwargs=kwargs).becomes("%0 = sin(x)\nreturn %0")


def test_fixed_sizes_of_the_inputs() -> None:
    with_sizes(lambda call, x: call(operator.lt, call(aten.sym_size.int, x, 0), 5)).becomes(
        "%0 = sin(x)\nreturn %0"
    )


def with_sizes(condition: Any, dynamic: Any = None) -> Ran:
    """A program that asserts something of the sizes of its input; export leaves out what does not vary."""

    def forward(m, x):
        return x.sin()

    model = program(forward)
    graph = capture(model, (X,), dynamic=dynamic)
    (x,), first = graph.placeholders, graph.calls[0]

    def call(target: Any, *args: Any) -> Any:
        with graph.fx.inserting_before(first):
            return graph.call(target, args, {}, first.meta[KEY])

    call(aten._assert_scalar.default, condition(call, x), "must hold")
    return rerun([PASS], model, graph, [X])


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten._assert_scalar.default, (False, "must hold"), {}),
        (aten.sym_constrain_range.default, (3,), {"max": 2}),
        (aten.sym_constrain_range.default, (3,), {"min": 4}),
        (aten.sym_constrain_range_for_size.default, (-1,), {}),
    ],
)
def test_what_does_not_hold_is_refused(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def forward(m, x):
        return x.sin()

    model = program(forward)
    graph = capture(model, (X,))
    with graph.fx.inserting_before(graph.calls[0]):
        node = graph.fx.call_function(target, args, kwargs)  # calling it would raise
    node.meta.update(graph.calls[1].meta, val=None)
    ran = rerun([PASS], model, graph, [X])
    ran.refuses("its condition is false: every call fails")
    assert effects(ran.graph) == 1


def test_a_tensor_that_is_false_is_refused() -> None:
    def forward(m, x):
        aten._assert_async.msg((m.table > 1).all(), "all must be more than one")
        return x * 2

    ran = run(PASS, program(forward, table=TABLE), X, redraw=False)
    ran.refuses("its condition is false: every call fails")


def test_values_of_an_input_are_refused() -> None:
    def forward(m, x, n):
        count = n.item()
        torch._check(count >= 2)
        aten._assert_async.msg((x > -100).all(), "must not be small")
        return x * 2

    ran = run([REMOVE_DEAD_CODE, PASS], program(forward), X, torch.tensor(3))
    ran.refuses("its condition depends on the input n").refuses("its condition depends on the input x")
    ran.counts(_assert_scalar=1, _assert_async=1, item=1)


def test_what_an_assertion_says_of_a_size_is_no_proof() -> None:
    """That the count is 3 is known from nothing else, and is written into every size that is made of it."""

    def forward(m, x, n):
        count = n.item()
        torch._check(count == 3)
        return x + x.new_zeros(count).sum()

    ran = run(PASS, program(forward), X, torch.tensor(3))
    ran.refuses("its condition depends on the input n")
    assert effects(ran.graph) == effects(ran.captured) > 0


def test_sizes_of_what_an_input_makes_are_refused() -> None:
    def forward(m, x):
        return x.sin().cos()

    model = program(forward)
    graph = capture(model, (X,))
    sin, cos = graph.calls
    with graph.fx.inserting_before(cos):
        size = graph.call(aten.sym_size.int, (sin, 0), {}, sin.meta[KEY])
        graph.call(aten._assert_scalar.default, (size, "must not be empty"), {}, sin.meta[KEY])
    rerun([PASS], model, graph, [X]).refuses("its condition depends on the input x")


def test_random_numbers_are_refused() -> None:
    def forward(m, x):
        aten._assert_async.msg(torch.rand(()) < 2, "must be less than two")
        return x * 2

    run(PASS, program(forward), X).refuses("its condition depends on the random numbers of rand")


def test_dynamic_sizes_are_refused() -> None:
    """Also where torch knows that they hold: by the ranges that capture assumed."""
    ran = with_sizes(lambda call, x: call(operator.ge, call(aten.sym_size.int, x, 0), 2), {"x": {0: "batch"}})
    ran.refuses("its condition depends on dimension 0 of the input x, which varies")
    assert effects(ran.graph) == 1


def test_a_constant_goes_in_a_dynamic_graph() -> None:
    def forward(m, x):
        aten._assert_async.msg((m.table > 0).all(), "all must be positive")
        return x * 2

    ran = run(PASS, program(forward, table=TABLE), X, redraw=False, dynamic={"x": {0: "batch"}})
    ran.becomes("%0 = mul(x, 2)\nreturn %0").agrees(randn(7, 5))


def test_a_graph_that_is_restored_asserts_again() -> None:
    def forward(m, x):
        aten._assert_async.msg((m.table > 0).all(), "all must be positive")
        return x * 2

    graph = capture(program(forward, table=TABLE), (X,))
    before, saved = text(graph), graph.snapshot()
    PassManager([PASS], Remarks(), LIMITS).run(graph, [X])
    assert effects(graph) == 0
    graph.restore(saved)
    assert text(graph) == before
    assert effects(graph) == 1


def test_what_stays_is_checked_at_every_call() -> None:
    def forward(m, x, n):
        aten._assert_async.msg((m.table > 0).all(), "all must be positive")
        aten._assert_async.msg((x > -100).all(), "must not be small")
        count = n.item()
        torch._check(count > 2)
        return x * count

    model = program(forward, table=TABLE)
    optimized = graphopt.optimize(model, (X, torch.tensor(3)), effort="fast")
    torch.testing.assert_close(optimized(X + 1, torch.tensor(4)), 4 * (X + 1))
    with pytest.raises(RuntimeError, match="must not be small"):
        optimized(X - 1000, torch.tensor(3))
    with pytest.raises(RuntimeError, match="u0 >= 3"):
        optimized(X, torch.tensor(2))
