from __future__ import annotations

import torch

from graphopt.capture.export import capture
from graphopt.ir.graph import Graph
from graphopt.passes.remove_dead_code import PASS
from tests._models import randn
from tests.passes._harness import program, rerun, run, text

X = randn(3, 4)


def captured(keep: int) -> tuple[torch.nn.Module, Graph]:
    """A program with two results, of which only one is still read."""

    def forward(m, x):
        y = x.sin()
        return y.exp(), (y + m.w).cos().relu()

    model = program(forward, w=randn(4))
    graph = capture(model, (X,))
    graph.output.args = ((graph.output.args[0][keep],),)
    return model, graph


def test_a_chain_that_nobody_reads_goes() -> None:
    model, graph = captured(keep=0)
    ran = rerun([PASS], model, graph, [X])
    ran.becomes("%0 = sin(x)\n%1 = exp(%0)\nreturn %1")
    assert ran.kept == {PASS.name: 1}
    assert ran.graph.constants == {}  # and with it its weight


def test_what_is_still_read_stays() -> None:
    model, graph = captured(keep=1)
    ran = rerun([PASS], model, graph, [X])
    ran.becomes("%0 = sin(x)\n%1 = add(%0, w)\n%2 = cos(%1)\n%3 = relu(%2)\nreturn %3")
    assert list(ran.graph.constants) == ["p_w"]


def test_a_second_run_finds_nothing() -> None:
    model, graph = captured(keep=0)
    ran = rerun([PASS], model, graph, [X])
    again = rerun([PASS], model, ran.graph, [X])
    assert again.outcome.rewrites == []
    assert text(again.graph) == text(ran.graph)


def test_a_living_graph_stays() -> None:
    def forward(m, x):
        return x.sin() + x

    run(PASS, program(forward), X).stays()


def test_what_has_an_effect_stays() -> None:
    def forward(m, x, n):
        size = n.item()
        torch._check(size >= 2)
        return x.sin()

    ran = run(PASS, program(forward), X, torch.tensor(3))
    assert "_assert_scalar" in text(ran.graph)


def test_what_has_several_results_goes_once_all_are_dead() -> None:
    def forward(m, x):
        low, high = x.split(2, dim=1)
        return low.sin(), high

    model = program(forward)
    graph = capture(model, (X,))
    graph.output.args = ((graph.output.args[0][0],),)
    rerun([PASS], model, graph, [X]).counts(split=1, getitem=1, sin=1)


def test_dynamic_sizes() -> None:
    def forward(m, x):
        return x.sin(), torch.arange(x.shape[1]) + 1

    model = program(forward)
    graph = capture(model, (X,), dynamic={"x": {0: "batch", 1: "seq"}})
    graph.output.args = ((graph.output.args[0][0],),)
    ran = rerun([PASS], model, graph, [X])
    ran.becomes("%0 = sin(x)\nreturn %0")
