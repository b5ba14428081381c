"""Small graphs and passes over them: good ones, and ones that are wrong in one particular way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.capture.export import capture
from graphopt.compiler.device import Limits
from graphopt.compiler.manager import Outcome, PassManager
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Call, Match, Var

aten = torch.ops.aten
LIMITS = Limits("test", flops_per_s=1e9, bytes_per_s=1e9)


class Of(nn.Module):
    """A model that is one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.training = False

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def graph_of(function: Callable[..., Any], *args: torch.Tensor) -> Graph:
    return capture(Of(function), args)


def unary(name: str, op: Any, build: Callable[[Rewriter, fx.Node], fx.Node], **more: Any) -> Pass:
    """op(x) -> whatever ``build`` makes of x."""

    def rewrite(rewriter: Rewriter, match: Match) -> None:
        rewriter.replace(match.root, build(rewriter, match["x"]))

    return Pass(name, "fuse", Call(op, Var("x")), rewrite, **more)


def good_silu(rewriter: Rewriter, x: fx.Node) -> fx.Node:
    return rewriter.call(aten.mul.Tensor, x, rewriter.call(aten.sigmoid.default, x))


GOOD = unary("spell_silu", aten.silu.default, good_silu)


def run(
    passes: Sequence[Pass], graph: Graph, inputs: Sequence[torch.Tensor], **more: Any
) -> tuple[Outcome, Remarks]:
    remarks = Remarks()
    return PassManager(passes, remarks, LIMITS, **more).run(graph, inputs), remarks
