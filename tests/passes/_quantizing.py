"""What the tests of passes that round weights share: one projection, and ranges observed on its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from graphopt.capture.export import capture
from graphopt.compiler.calibration import keep, observe
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.passes import quantize_conv_int8
from graphopt.passes._projections import matches, source
from tests.passes._harness import program


def projection(**options: Any) -> nn.Module:
    return program(lambda m, x: m.layer(x), layer=nn.Linear(64, 80, **options))


def calibrated(model: nn.Module, *args: torch.Tensor, more: tuple[torch.Tensor, ...] = ()) -> Graph:
    """The captured model with the ranges of its products' inputs, and of its convolutions', written down."""
    return calibrate(capture(model, args, {}), [list(args), *([x] for x in more)])


def calibrate(graph: Graph, calls: list[list[torch.Tensor]]) -> Graph:
    """The same of a graph, which is changed in place."""
    for match in matches(graph):
        place = (source(match.root), -1)
        keep(match.root, x=observe(graph, [place], calls).get(place))
    for match in quantize_conv_int8.pattern(graph):
        places: list[tuple[fx.Node, int]] = [(quantize_conv_int8.source(match.root), 1), (match.root, 1)]
        found = observe(graph, places, calls)
        keep(match.root, x=found.get(places[0]), out=found.get(places[1]))
    return graph


def rewritten(rule: Pass, graph: Graph) -> Graph:
    """Every match that the pass takes, rewritten; the graph is changed in place."""
    for match in list(rule.matches(graph)):
        if rule.check(match) is None:
            rewriter = Rewriter(match, rule.name)
            rule.rewrite(rewriter, match)
            rewriter.commit()
    graph.check()
    return graph


def refusal(rule: Pass, graph: Graph) -> str | None:
    (match,) = rule.matches(graph)
    return rule.check(match)
