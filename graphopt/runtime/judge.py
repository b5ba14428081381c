"""The built-in judge of a bisection: the rewritten model, as it would run, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from graphopt.compiler.bisect import Answer
from graphopt.compiler.device import Limits
from graphopt.compiler.manager import PassManager
from graphopt.compiler.pass_ import Pass
from graphopt.compiler.reference import computed, output_reference
from graphopt.compiler.remarks import Remarks
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.ir.graph import Graph
from graphopt.runtime import scheduler
from graphopt.runtime.target import Target
from graphopt.runtime.ways import plan_candidates

_SEED, _DRAWS = 20241107, 3


def judge_by_comparison(
    graph: Graph, inputs: Sequence[torch.Tensor], passes: Sequence[Pass], limits: Limits
) -> Callable[[int], Answer]:
    """A judge that applies so many rewrites, runs the model in every way that it could run, and compares.

    Args:
        graph: as captured.
        inputs: the example inputs: flat tensors. Others of the same kind are drawn from them.
        passes: in order.
        limits: of the target.
    """
    draws = list(_like(inputs))
    references = [output_reference(graph, draw, MODEL_FLOOR_ULPS) for draw in draws]
    device = inputs[0].device if inputs else torch.device("cpu")

    def judge(applied: int) -> Answer:
        rewritten = PassManager(passes, Remarks(), limits, limit=applied).run(graph.clone(), inputs).graph
        for candidate in plan_candidates(graph, rewritten, None, Target(device), Remarks(), "fast"):
            if candidate.plan is None or candidate.graph is graph:
                continue
            for draw, reference in zip(draws, references, strict=True):
                try:
                    after = scheduler.run(candidate.plan, draw)
                except Exception:
                    return "bad"
                if not reference.compare(computed(graph, after)).ok:
                    return "bad"
        return "good"

    return judge


def _like(inputs: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The inputs, and others of their shapes: floats drawn anew, all else in another order along the rows."""
    yield list(inputs)
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(_DRAWS):
        yield [_drawn(tensor, generator) for tensor in inputs]


def _drawn(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator).to(tensor)
    if tensor.dim() == 0:
        return tensor
    order = torch.randperm(tensor.shape[-1], generator=generator).to(tensor.device)
    return tensor[..., order]
