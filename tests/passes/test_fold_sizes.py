from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.capture.export import capture
from graphopt.ir.graph import Graph
from graphopt.ir.provenance import KEY
from graphopt.passes.fold_sizes import PASS
from graphopt.passes.merge_common_subexpressions import PASS as MERGE
from tests._models import randn
from tests.passes._harness import Ran, program, rerun, run

aten = torch.ops.aten
X = randn(6, 4)


def rewired(graph: Graph, change: Callable[[Callable[..., fx.Node], fx.Node], Any]) -> Graph:
    """The graph, its last call's size (its second argument) computed in another way from the first size."""
    (last,) = [node for node in graph.calls if node.target is aten.arange.default]
    size: Any = last.args[0]

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.fx.inserting_before(last):
            return graph.call(target, args, {}, last.meta[KEY])

    last.args = (change(call, size),)
    graph.module.recompile()
    return graph


def swept(change: Callable[[Callable[..., fx.Node], fx.Node], Any]) -> Ran:
    def forward(m, x):
        return x.sum(1) * torch.arange(x.shape[0])

    model = program(forward)
    graph = rewired(capture(model, (X,), dynamic={"x": {0: "batch"}}), change)
    ran = rerun([PASS], model, graph, [X])
    again = rerun([PASS], model, ran.graph, [X])
    assert not again.kept
    return ran


def test_a_product_that_is_divided_again() -> None:
    ran = swept(lambda call, s: call(operator.floordiv, call(operator.mul, s, 4), 4))
    ran.becomes("""
        %0 = sym_size(x, 0)
        %1 = sum(x, [1])
        %2 = arange(%0)
        %3 = mul(%1, %2)
        return %3
    """)
    ran.agrees(randn(3, 4)).agrees(randn(1, 4))


def test_chains() -> None:
    swept(lambda call, s: call(operator.sub, s, 0)).counts(sub=0)
    swept(lambda call, s: call(operator.sub, call(operator.add, s, 3), 3)).counts(add=0, sub=0)
    swept(lambda call, s: call(operator.mul, call(operator.floordiv, s, 1), 1)).counts(floordiv=0)


def test_a_size_that_is_asked_for_twice() -> None:
    ran = swept(lambda call, s: call(aten.sym_size.int, s.args[0], 0))
    ran.counts(sym_size=1).agrees(randn(3, 4))


def test_a_size_that_is_one_number() -> None:
    def forward(m, x):
        return x + torch.arange(4)

    model = program(forward)
    graph = capture(model, (X,), dynamic={"x": {0: "batch"}})

    def change(call: Callable[..., fx.Node], size: Any) -> fx.Node:
        (x,) = graph.placeholders
        batch = call(aten.sym_size.int, x, 0)
        return call(operator.add, call(operator.sub, batch, batch), 4)

    ran = rerun([PASS], model, rewired(graph, change), [X])
    ran.becomes("""
        %0 = arange(4)
        %1 = add(x, %0)
        return %1
    """)


def test_what_differs_stays() -> None:
    def forward(m, x):
        return torch.arange(x.shape[0]), torch.arange(x.shape[1]), torch.arange(x.shape[0] * 2)

    run(PASS, program(forward), X, dynamic={"x": {0: "batch", 1: "seq"}}).stays()


def test_a_table_of_equal_sizes_is_computed_once() -> None:
    def forward(m, x):
        for _ in range(3):
            x = x * torch.arange(x.shape[0] * 4 // 4 - 0).exp()[:, None]
        return x

    ran = run([PASS, MERGE], program(forward), X, dynamic={"x": {0: "batch"}})
    ran.counts(arange=1, exp=1, mul=3).agrees(randn(3, 4))
