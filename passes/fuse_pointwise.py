"""f(g(x, y), z) of pointwise steps -> pointwise([x, y, z], program): a region for a generator of kernels.

Level 3: it pays where something makes a kernel of the program. ONNX Runtime's CPU provider runs the steps one
by one as before, and so does the reference.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import Match
from graphopt.kernels.pointwise import OP as POINTWISE
from graphopt.passes._pointwise import is_pointwise
from graphopt.passes._steps import is_floating, refuse_step, step_of, written


def pattern(graph: Graph) -> Iterator[Match]:
    """Every largest region of steps that one step ends, and the pairs that something keeps apart."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    for root in reversed(graph.calls):
        if root._erased or root in taken or refuse_step(root) is not None or not is_floating(root):
            continue
        region, stop = _grown(root, order)
        taken |= region
        if len(region) > 1:
            yield Match(graph, root, tuple(sorted(region)), {"stop": None})
        elif stop is not None:
            yield Match(graph, root, (stop[0], root), {"stop": stop[1]})


def check(match: Match) -> str | None:
    """What keeps a step and the one before it apart."""
    reason: str | None = match["stop"]
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """The steps as a program, in the order of the graph."""
    number = {node: index for index, node in enumerate(match.inputs)}
    lines = []
    for node in match.nodes:
        call = written(number, *step_of(node))
        lines.append(f"%{number.setdefault(node, len(number))} = {call}")
    rewriter.replace(match.root, rewriter.call(POINTWISE.overload, match.inputs, "\n".join(lines)))


def _grown(root: fx.Node, order: dict[fx.Node, int]) -> tuple[set[fx.Node], tuple[fx.Node, str] | None]:
    """The steps that serve a step alone, and the first one before it that does not fit, with the reason."""
    region, stop = {root}, None
    count = itertools.count()
    waiting = [(-order[source], next(count), source) for source in root.all_input_nodes]
    heapq.heapify(waiting)
    while waiting:  # the last first: all its readers are known then
        _, _, node = heapq.heappop(waiting)
        if node in region or not is_pointwise(node):
            continue
        reason = _refuse_member(node, root, region)
        if reason is None:
            region.add(node)
            for source in node.all_input_nodes:
                heapq.heappush(waiting, (-order[source], next(count), source))
        elif stop is None:
            stop = node, reason
    return region, stop


def _refuse_member(node: fx.Node, root: fx.Node, region: set[fx.Node]) -> str | None:
    reader = next((user for user in node.users if user not in region), None)
    if reader is not None:
        return f"{node.name} is also read by {reader.name}"
    if not same_shape(node.meta["val"].shape, root.meta["val"].shape):
        return f"{node.name} has another size than {root.name}"
    return refuse_step(node)


PASS = register(Pass("fuse_pointwise", "fuse", pattern, rewrite, check, level=3))
