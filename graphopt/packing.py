"""Padding removal: which outputs may forget padded positions, and the plan that computes none of them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from graphopt.compiler.device import Limits
from graphopt.compiler.manager import PassManager
from graphopt.compiler.remarks import Remarks, Rewrite
from graphopt.errors import LoweringError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.packed_attention import OP as PACKED_ATTENTION
from graphopt.passes._packing import Spot, attended_tokens, condition_of, packs_by_tokens, sources
from graphopt.passes._spare_rows import reader_of_spare_rows
from graphopt.passes.default import packing
from graphopt.passes.pack_tokens import reads_first
from graphopt.runtime import scheduler
from graphopt.runtime.candidates import Candidate
from graphopt.runtime.measure import interleaved
from graphopt.runtime.plan import Padded, Plan
from graphopt.runtime.token_buckets import mark

aten = torch.ops.aten

Padding = Literal["keep", "remove"]
_UNTIMED = 0.9  # the fullest mask that is packed when nothing is timed: packing costs a few gathers a layer
_SECONDS = 1.0  # about how long the two plans are timed on a mask without padding


@dataclass(frozen=True)
class Packed:
    """A graph that computes real tokens only.

    Args:
        graph: the graph.
        rewrites: what made it.
        mask: name of the input that tells real tokens.
        first: it takes for granted that every sequence begins with a token that the mask marks with 1.
    """

    graph: Graph
    rewrites: list[Rewrite]
    mask: str
    first: bool


def zero_padding(graphs: Sequence[Graph], remarks: Remarks) -> None:
    """Make padded positions of a model's outputs zero, in place: what they are then need not be computed.

    Which outputs those are the last of the graphs tells: those whose every token is computed from values of
    that token, (batch, length, features). All others stay as they are.

    Args:
        graphs: the same model, as captured and rewritten.
        remarks: takes why there is nothing to do.
    """
    rewritten = graphs[-1]
    mask = attended_tokens(rewritten)
    if mask is None or mask.op != "placeholder":
        remarks.add("missed", "zero_padding", None, f"padding stays: {_without_mask(rewritten, mask)}")
        return
    results: Any = rewritten.output.args[0]
    ends = [index for index, result in enumerate(results) if _is_of_tokens(result, mask)]
    for graph in graphs:
        given = next(node for node in graph.placeholders if node.name == mask.name)
        graph.output.args = (_zeroed(graph, given, ends),)
        graph.module.recompile()


def _without_mask(graph: Graph, tokens: fx.Node | None) -> str:
    if tokens is not None:
        return f"the mask of its attention is computed ({tokens.name}), not given by the caller"
    for node in graph.fx.find_nodes(op="call_function", target=ATTENTION.overload):
        mask = argument(node, "mask")
        if mask is not None:
            return f"the mask of {node.name} ({mask.name}) is not one of keys alone: a bias perhaps"
    return "no attention of the model has a mask"


def _is_of_tokens(result: Any, mask: fx.Node) -> bool:
    """True for an output with a value for each token, made of what the model computes for that token."""
    value = result.meta["val"] if isinstance(result, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
        return False
    return same_shape(value.shape[:2], mask.meta["val"].shape) and bool(sources(result, Spot.leading(3)))


def _zeroed(graph: Graph, mask: fx.Node, ends: Collection[int]) -> tuple[Any, ...]:
    results = list(graph.output.args[0])  # type: ignore[arg-type]
    with graph.fx.inserting_before(graph.output):
        place = provenance.of(results[min(ends)]) if ends else None
        condition = mask
        if place is not None and mask.meta["val"].dtype != torch.bool:
            there = (user for user in mask.users if user.args[1:] == (torch.bool,))
            condition = next(there, None) or graph.call(aten.to.dtype, (mask, torch.bool), {}, place)
        for index in ends:
            where = provenance.of(results[index])
            column = graph.call(aten.unsqueeze.default, (condition, -1), {}, where)
            results[index] = graph.call(aten.where.ScalarOther, (column, results[index], 0.0), {}, where)
    return tuple(results)


def remove_padding(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    remarks: Remarks,
    limits: Limits,
    disable: Collection[str] = (),
) -> Packed | None:
    """A copy of a rewritten graph that computes real tokens only; None where that cannot be, or does not pay.

    Args:
        graph: the graph after the passes; it stays as it is.
        inputs: the example inputs.
        remarks: takes what was done, and why something was not.
        limits: of the target, for the price of what was not.
        disable: names of passes to leave out.
    """
    mask = attended_tokens(graph)
    if mask is None or mask.op != "placeholder":
        return None
    given = inputs[graph.placeholders.index(mask)]
    if bool(given.all()):
        reason = f"padding is not removed: the example's {mask.name} pads nothing"
        remarks.add("analysis", "remove_padding", None, reason)
        return None
    outcome = PassManager(packing(disable), remarks, limits).run(graph.clone(), inputs)
    if not outcome.graph.fx.find_nodes(op="call_function", target=PACKED_ATTENTION.overload):
        return None
    first = reads_first(outcome.graph)
    if first and not bool((given[:, 0] == 1).all()):
        reason = "padding is not removed: the example pads a first position, which the model reads"
        remarks.add("missed", "remove_padding", None, reason)
        return None
    for indices, _ in packs_by_tokens(outcome.graph):
        if condition_of(indices) is not None:
            mark(indices.args[0], reader_of_spare_rows(outcome.graph, indices))  # type: ignore[arg-type]
    return Packed(outcome.graph, outcome.kept, mask.name, first)


def with_padded(
    best: Candidate,
    others: Sequence[Candidate],
    packed: Packed,
    inputs: Sequence[torch.Tensor],
    *,
    timed: bool,
) -> Plan:
    """The plan of the packed candidate, with the best of the others for the calls that have little padding.

    Args:
        best: the packed candidate.
        others: those that keep the padding.
        packed: what the candidate runs.
        inputs: the example inputs.
        timed: measure from how full a mask on the other is faster.

    Raises:
        LoweringError: there is no plan that keeps the padding, for a mask without a token.
    """
    right = [candidate for candidate in others if candidate.plan is not None]
    assert best.plan is not None
    if not right:
        raise LoweringError("no executor runs the model with its padding, which some calls want")
    other = min(right, key=lambda c: c.timing.lower_ms if c.timing else 0.0).plan
    assert other is not None
    at = best.plan.inputs.index(packed.mask)
    fullest = _fullest(best.plan, other, inputs, at) if timed else _UNTIMED
    return replace(best.plan, padded=Padded(other, packed.mask, fullest, packed.first))


def _fullest(packed: Plan, padded: Plan, inputs: Sequence[torch.Tensor], at: int) -> float:
    """The share of real tokens at which the two plans take as long: that of the packed one grows with it."""
    full = [*inputs[:at], torch.ones_like(inputs[at]), *inputs[at + 1 :]]
    share = float(torch.count_nonzero(inputs[at])) / inputs[at].numel()
    calls = ((packed, inputs), (packed, full), (padded, full))
    runs = [functools.partial(scheduler.run, plan, given) for plan, given in calls]
    some, whole, other = (
        timing.median_ms for timing in interleaved(runs, seconds=_SECONDS, device=packed.device)
    )
    if whole <= other:
        return 1.0
    return min(1.0, max(share, share + (1 - share) * (other - some) / (whole - some)))
