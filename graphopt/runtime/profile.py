"""What each node of a plan takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.ir import provenance
from graphopt.runtime.plan import Plan


@dataclass(frozen=True)
class NodeTime:
    """What one node of the plan took.

    Args:
        node: its name in the optimized graph, or the executor's own name for one that it made.
        op: the kernel that ran: an ATen or ONNX op.
        executor: who ran it.
        ms: mean time of one call, in milliseconds.
        source: the user's ``file:line``.
        module: the ``nn.Module`` path.
    """

    node: str
    op: str
    executor: str
    ms: float
    source: str
    module: str


def node_times(plan: Plan, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
    """Run a plan once more, each program telling what its nodes take; slowest first.

    Args:
        plan: the plan.
        inputs: tensors in the plan's input order.
    """
    values = dict(zip(plan.inputs, inputs, strict=True)) | plan.constants
    rows: list[NodeTime] = []
    for step in plan.steps:
        reads = [values[name] for name in step.region.reads]
        results, times = step.program.profile(reads)
        values.update(zip(step.region.writes, results, strict=True))
        ours = {node.name: provenance.of(node) for node in step.region.graph.calls}
        for row in times:
            place = ours.get(row.node, provenance.Provenance())
            rows.append(NodeTime(row.node, row.op, step.executor, row.ms, place.source, place.module))
    return sorted(rows, key=lambda row: -row.ms)
