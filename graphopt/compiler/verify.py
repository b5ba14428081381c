"""Verified or reverted: a staged rewrite is run beside the region it replaces, and both beside float64."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.compiler.compare import Comparison
from graphopt.compiler.evaluate import Activations, evaluate
from graphopt.compiler.hostile import hostile_inputs
from graphopt.compiler.reference import Reference
from graphopt.compiler.rewriter import Rewriter
from graphopt.compiler.tolerance import REGION_FLOOR_ULPS
from graphopt.ir.graph import Graph, is_symbolic

aten = torch.ops.aten


class Verifier:
    """Checks rewrites of one graph; identical ones once.

    Args:
        graph: the graph being rewritten.
        inputs: the example inputs: flat tensors in placeholder order.
        share: let a region that is structurally identical to a checked one take over its verdict.
    """

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor], *, share: bool = True) -> None:
        self.graph = graph
        self.activations = Activations(graph, inputs)
        self.share = share
        self._verdicts: dict[Any, Comparison] = {}

    def verify(self, rewriter: Rewriter) -> tuple[Comparison, bool]:
        """Judge a staged rewrite.

        Returns:
            The comparison that decides (the worst one that is still right, or the first wrong one), and
            whether it was taken over from an identical region.
        """
        key = structure(rewriter) if self.share else None
        if key is not None and key in self._verdicts:
            return self._verdicts[key], True
        verdict = self._check(rewriter)
        if key is not None and verdict.ok:
            self._verdicts[key] = verdict
        return verdict, False

    def _check(self, rewriter: Rewriter) -> Comparison:
        old, new = list(rewriter.replaced), list(rewriter.replaced.values())
        if not old:  # only dead nodes go
            return Comparison(0.0, 0.0, True)
        sources = [node for node in frontier(rewriter) if node.op != "get_attr"]
        real = self.activations.values(sources)
        guarded = rewriter.match.get("guarded", ())  # the rewrite is right where these are as in the example
        varies = [node not in guarded and _depends_on_values(node) for node in sources]
        worst = Comparison(0.0, 0.0, True)
        for label, values in [("the example inputs", real), *hostile_inputs(real, varies)]:
            given = dict(zip(sources, values, strict=True))
            try:
                reference = Reference(self.graph, old, given, REGION_FLOOR_ULPS)
            except RuntimeError:  # view_as_complex of what is not contiguous
                if values is real:
                    raise
                continue  # the original refuses such inputs too
            found = reference.compare(evaluate(self.graph, new, given))
            if not found.ok:
                reason = f"on {label}: {found.reason}"
                return Comparison(found.error_before, found.error_after, False, reason)
            if found.error_after >= worst.error_after:
                worst = found
        return worst


def frontier(rewriter: Rewriter) -> list[fx.Node]:
    """The values that the region is verified from: its inputs, or what lies behind them.

    A replacement may reach behind the matched nodes (around a transpose that it cancels). What lies between
    the value it reads and the region then belongs to the region: as inputs, the two would be varied apart.
    """
    region = set(rewriter.match.nodes)
    inputs = set(rewriter.match.inputs)
    staged = set(rewriter.staged)
    read = {source for node in rewriter.staged for source in node.all_input_nodes} - staged
    region.update(new for new in rewriter.replaced.values() if new not in staged | inputs)
    behind = {node for node in read - region if node.op in ("call_function", "placeholder")}
    region |= _between(behind, inputs - region)
    reads = (source for node in sorted(region) for source in node.all_input_nodes)
    return list(dict.fromkeys([*(s for s in reads if s not in region), *sorted(behind)]))


_NEAR = 256  # nodes: how far apart the two ends of a rewrite are looked for


def _between(starts: set[fx.Node], ends: set[fx.Node]) -> set[fx.Node]:
    """The nodes on ways from the starts to the ends, the ends included that depend on a start.

    Only the nodes nearest to the ends are looked at. Missing a way is safe: the two ends are then varied
    apart, and the rewrite does not pass.
    """
    if not starts:
        return set()
    found: dict[fx.Node, None] = dict.fromkeys(ends)
    work = deque(ends)
    while work and len(found) < _NEAR:
        node = work.popleft()
        new = [source for source in node.all_input_nodes if source not in found]
        found.update(dict.fromkeys(new))
        work.extend(source for source in new if source not in starts)
    depends = set(starts)
    for node in sorted(found):
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    return depends - starts


def _depends_on_values(node: fx.Node) -> bool:
    """False for what is the same for every input of these sizes: constants, and ranges over sizes."""
    seen: set[fx.Node] = set()
    work = [node]
    while work:
        current = work.pop()
        if current in seen or (current.op == "call_function" and is_symbolic(current)):
            continue
        if current.op == "placeholder":
            return True
        seen.add(current)
        unread = _SHAPE_ONLY.get(current.target, -1)
        args = [value for index, value in enumerate(current.args) if index != unread]
        fx.map_arg((args, current.kwargs), work.append)
    return False


# Which argument lends its sizes or its type, and not its values.
_SHAPE_ONLY: dict[Any, int] = {
    **dict.fromkeys((aten.ones_like.default, aten.zeros_like.default, aten.full_like.default), 0),
    **dict.fromkeys((aten.new_ones.default, aten.new_zeros.default, aten.new_full.default), 0),
    **dict.fromkeys((aten.expand_as.default, aten.view_as.default, aten.type_as.default), 1),
}


def structure(rewriter: Rewriter) -> Any:
    """A key that two rewrites share when they do the same to regions of the same shape.

    It covers ops, literals, shapes, dtypes and wiring of the region before and after, and the values of small
    constants; of weights only shape and dtype. The whole model is compared again at the end.
    """
    numbers: dict[fx.Node, int] = {}
    inputs = rewriter.match.inputs
    rows: list[Any] = [rewriter.pass_name]
    for node in (*inputs, *rewriter.match.nodes, *rewriter.staged):
        for source in (*node.all_input_nodes, node) if node not in inputs else (node,):
            if source not in numbers:
                numbers[source] = len(numbers)
                rows.append((numbers[source], _value_key(rewriter.graph, source)))
        if node not in inputs:
            target = "" if node.op == "get_attr" else str(node.target)
            rows.append((numbers[node], target, _literal_key((node.args, node.kwargs), numbers)))
    rows.append([(numbers[old], numbers.get(new, -1)) for old, new in rewriter.replaced.items()])
    return repr(rows)


def _value_key(graph: Graph, node: fx.Node) -> Any:
    val = node.meta.get("val")
    shapes = [
        (str(v.dtype), str(tuple(v.shape)), str(v.device)) if isinstance(v, torch.Tensor) else str(v)
        for v in pytree.tree_leaves(val)
    ]
    constant = graph.constant(node)
    small = constant is not None and constant.numel() <= 1
    return node.op, shapes, constant.tolist() if small and constant is not None else None


def _literal_key(value: Any, numbers: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, (list, tuple)):
        return [_literal_key(item, numbers) for item in value]
    if isinstance(value, dict):
        return [(key, _literal_key(item, numbers)) for key, item in value.items()]
    return repr(value)
