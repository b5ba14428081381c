"""sum(f(x, y)), x / norm(x), softmax(g(x)) over the last dimensions -> pointwise([x, y], program, dims).

Level 3, as ``fuse_pointwise``: it pays where something makes a kernel of the program.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.kernels._program import OVER_ONE
from graphopt.kernels.pointwise import OP as POINTWISE
from graphopt.passes._reductions import Rows, is_reduction, name_of, rows_of
from graphopt.passes._steps import is_floating, is_tensor, refuse_step, step_of, written

aten = torch.ops.aten

_FURTHEST = 64  # calls that are looked at ahead of one for the reduction that it depends on


def pattern(graph: Graph) -> Iterator[Match]:
    """Every largest region around a reduction that one call ends, and reductions that stand alone."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    for root in reversed(graph.calls):
        if root._erased or root in taken or not is_floating(root) or root.target is aten.expand.default:
            continue
        rows = _rows_behind(root, order)
        if rows is None:
            continue
        if isinstance(rows, str):
            yield Match(graph, root, (root,), {"stop": rows})
            continue
        region, stop = _Region(root, rows, order).grown()
        if len(region) > 1 and stop is None:
            taken |= region
            yield Match(graph, root, tuple(sorted(region)), {"stop": None, "rows": rows})
        elif stop is not None and is_reduction(root):
            yield Match(graph, root, (stop[0], root), {"stop": stop[1]})


def check(match: Match) -> str | None:
    """What keeps a reduction apart from all else."""
    reason: str | None = match["stop"]
    return reason


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One kernel reads what came in once, and writes what the last step makes."""
    rows: Rows = match["rows"]
    number: dict[fx.Node, int] = {}
    for node in match.inputs:
        if is_tensor(node):
            number[node] = len(number)
    inputs = list(number)
    lines: list[str] = []
    for node in match.nodes:
        if node.target is aten.expand.default:
            number[node] = number[_operand(node)]
            continue
        call = (name_of(node), (_operand(node),)) if is_reduction(node) else step_of(node)
        name = f"%{len(inputs) + len(lines)}"
        lines.append(f"{name} = {written(number, *call)}")
        number[node] = len(inputs) + len(lines) - 1
    keepdim = rows.form(match.root.meta["val"].shape) != "dropped"
    program = rewriter.call(POINTWISE.overload, inputs, "\n".join(lines), rows.dims, keepdim)
    rewriter.replace(match.root, program)


def _operand(node: fx.Node) -> fx.Node:
    """The tensor that a reduction or an expansion reads."""
    source: Any = node.args[0]
    return source  # type: ignore[no-any-return]


def _rows_behind(root: fx.Node, order: dict[fx.Node, int]) -> Rows | str | None:
    """The rows of the last reduction that a step depends on by steps alone; why there are none; None."""
    count = itertools.count()
    waiting, seen = [(-order[root], next(count), root)], {root}
    while waiting and len(seen) <= _FURTHEST:
        _, _, node = heapq.heappop(waiting)
        if is_reduction(node):
            rows = rows_of(node)
            return rows if isinstance(rows, Rows) or node is root else None
        if node.target is not aten.expand.default and refuse_step(node) is not None:
            continue
        for source in node.all_input_nodes:
            if source not in seen and source.op == "call_function" and is_tensor(source):
                seen.add(source)
                heapq.heappush(waiting, (-order[source], next(count), source))
    return None


class _Region:
    """The calls that serve one call alone, and are steps over the same rows.

    Args:
        root: the last of them.
        rows: that its reductions are of.
        order: places of the graph's nodes.
    """

    def __init__(self, root: fx.Node, rows: Rows, order: dict[fx.Node, int]) -> None:
        self._root, self._rows, self._order = root, rows, order
        self._form: dict[fx.Node, str] = {}

    def grown(self) -> tuple[set[fx.Node], tuple[fx.Node, str] | None]:
        """The region, and what keeps it from being one, with the reason."""
        reason = self._refuse(self._root)
        if reason is not None:
            return set(), None
        stop: tuple[fx.Node, str] | None = None
        count = itertools.count()
        waiting = [(0, next(count), self._root)]
        while waiting:  # the last first: all its readers are known then
            _, _, node = heapq.heappop(waiting)
            if node in self._form:
                continue
            reason = self._refuse(node)
            if reason is not None:
                stop = stop or (node, reason)
                continue
            self._form[node] = self._form_of(node)
            for source in node.all_input_nodes:
                if source.op == "call_function" and is_tensor(source):
                    heapq.heappush(waiting, (-self._order[source], next(count), source))
        region = set(self._form)
        if not any(map(is_reduction, region)):
            return region, (self._root, "no reduction serves it alone")
        return region, self._stray() or (stop if len(region) == 1 else None)

    def _form_of(self, node: fx.Node) -> str:
        return self._rows.form(node.meta["val"].shape) or ""

    def _refuse(self, node: fx.Node) -> str | None:
        """Why a call is none of the region, whose later calls are known."""
        reader = next((user for user in node.users if user not in self._form), None)
        if node is not self._root and reader is not None:
            return f"{node.name} is also read by {reader.name}"
        form = self._form_of(node)
        if not form:
            return f"{node.name} has another size than the rows"
        mixed = next((user for user in node.users if self._misreads(user, form)), None)
        if node is not self._root and mixed is not None:
            return f"{mixed.name} reads {node.name} without the dimensions that were taken together"
        if is_reduction(node):
            return self._refuse_reduction(node)
        if node.target is aten.expand.default:
            implied = form == "whole" and self._form_of(_operand(node)) == "kept"
            implied = implied and all(self._reads_whole_rows(user, node) for user in node.users)
            return None if implied else f"{node.name} makes what the next step would not by itself"
        return refuse_step(node)

    def _reads_whole_rows(self, user: fx.Node, besides: fx.Node) -> bool:
        """Whether a step broadcasts one operand by itself, since another has whole rows."""
        others = [source for source in user.all_input_nodes if source is not besides and is_tensor(source)]
        expanded = aten.expand.default
        return any(self._form_of(other) == "whole" and other.target is not expanded for other in others)

    def _refuse_reduction(self, node: fx.Node) -> str | None:
        rows = rows_of(node)
        if isinstance(rows, str):
            return rows
        same = rows.dims == self._rows.dims and self._rows.form(rows.whole) == "whole"
        whole = (self._form_of(node) == "whole") == (name_of(node) in OVER_ONE)
        return None if same and whole else f"{node.name} is over other rows"

    def _misreads(self, user: fx.Node, form: str) -> bool:
        """Whether a call of the region takes a value's dimensions for others."""
        if user not in self._form:
            return False
        if is_reduction(user):
            return form != "whole"
        return (form == "dropped") != (self._form[user] == "dropped")

    def _stray(self) -> tuple[fx.Node, str] | None:
        """A tensor from outside that is read where the dimensions of rows were dropped: it counts others."""
        for node, form in self._form.items():
            if form != "dropped" or is_reduction(node):
                continue
            for source in node.all_input_nodes:
                if source not in self._form and source.meta["val"].dim() > 0:
                    return (
                        node,
                        f"{node.name} reads {source.name} beside values of rows without their dimensions",
                    )
        return None


PASS = register(Pass("fuse_reduction", "fuse", pattern, rewrite, check, level=3))
