"""Driving a pass that is not exact: its rewrites are committed as they come, without verification."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from tests.passes._harness import results


def lossy(rule: Pass, model: nn.Module, *args: torch.Tensor, dynamic: Any = None, rounds: int = 1) -> Graph:
    """The captured model with every match of so many rounds applied."""
    graph = capture(model, args, {}, dynamic=dynamic)
    for _ in range(rounds):
        for match in rule.matches(graph):
            if any(node._erased for node in match.nodes) or rule.check(match) is not None:
                continue
            rewriter = Rewriter(match, rule.name)
            rule.rewrite(rewriter, match)
            rewriter.commit()
        graph.check()
    return graph


def agrees(graph: Graph, model: nn.Module, *args: torch.Tensor) -> None:
    """The graph computes what the model does."""
    with torch.no_grad():
        torch.testing.assert_close(results(graph, args)[0], model(*args), rtol=1e-4, atol=1e-5)
