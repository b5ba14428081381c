"""f(g(x, y), z) of pointwise steps -> pointwise([x, y, z], program): a region for a generator of kernels.

Level 3: it pays where something makes a kernel of the program. ONNX Runtime's CPU provider runs the steps one
by one as before, and so does the reference.
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
from graphopt.ir.graph import Graph, same_shape
from graphopt.ir.pattern import Match, argument, arguments
from graphopt.kernels._program import COMPARISONS, FUNCTIONS
from graphopt.kernels.pointwise import OP as POINTWISE
from graphopt.passes._epilogue import is_activation, named
from graphopt.passes._pointwise import is_pointwise

aten = torch.ops.aten

_ARITHMETIC = ("add", "sub", "mul", "div")
_UNARY = (
    *("neg", "abs", "exp", "log", "erf", "sin", "cos", "floor", "ceil"),
    *("sqrt", "rsqrt", "reciprocal", "square"),
)
_NAMES: dict[Any, str] = {
    **{getattr(getattr(aten, name), of): name for name in _ARITHMETIC for of in ("Tensor", "Scalar")},
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "pow",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    **{getattr(getattr(aten, name), of): name for name in COMPARISONS for of in ("Tensor", "Scalar")},
    **{getattr(aten.where, of): "where" for of in ("self", "ScalarSelf", "ScalarOther")},
    **{getattr(aten, name).default: name for name in _UNARY},
    aten.to.dtype: "to",
}
_DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def pattern(graph: Graph) -> Iterator[Match]:
    """Every largest region of steps that one step ends, and the pairs that something keeps apart."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    for root in reversed(graph.calls):
        if root._erased or root in taken or _refuse_step(root) is not None or not _is_floating(root):
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
        name, operands = _step(node)
        own = number.setdefault(node, len(number))
        written = ", ".join(f"%{number[o]}" if isinstance(o, fx.Node) else str(o) for o in operands)
        lines.append(f"%{own} = {name}({written})")
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
    return _refuse_step(node)


def _refuse_step(node: fx.Node) -> str | None:
    """Why a call is no step of a program, or None."""
    name = getattr(node.target, "__name__", str(node.target))
    if node.target not in _NAMES and not is_activation(node):
        return f"{name} has no name in a program"
    dtypes = [source.meta["val"].dtype for source in node.all_input_nodes if _is_tensor(source)]
    if len(dtypes) < len(node.all_input_nodes):
        return f"{name} reads a size"
    own = dtypes[1:] if _NAMES.get(node.target) == "where" and len(node.all_input_nodes) > 1 else dtypes
    if len(set(own)) != 1 or own[0] not in _DTYPES:
        return f"the operands of {name} are {' and '.join(map(str, dtypes))}"
    name, operands = _step(node)
    written = all(isinstance(operand, fx.Node) or type(operand) in (int, float, str) for operand in operands)
    return None if written and _is_plain(node) else f"{name} has an option that a program does not name"


def _step(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """A call's name and operands in a program."""
    if node.target not in _NAMES:
        name, parameter = named(node) or ("", 1.0)
        return name, (node.args[0], parameter)
    name = _NAMES[node.target]
    if name == "to":
        return name, (node.args[0], _DTYPES.get(node.meta["val"].dtype, "another type"))
    return name, tuple(node.args[: FUNCTIONS[name].arity])


def _is_plain(node: fx.Node) -> bool:
    """Whether the arguments that a program does not name have their defaults."""
    if node.target is aten.to.dtype:
        return node.meta["val"].dtype in _DTYPES and argument(node, "memory_format") is None
    if node.target not in _NAMES:
        return True
    given = list(arguments(node).values())[FUNCTIONS[_NAMES[node.target]].arity :]
    return all(value == default for value, default in given)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_floating(node: fx.Node) -> bool:
    return _is_tensor(node) and node.meta["val"].is_floating_point()


PASS = register(Pass("fuse_pointwise", "fuse", pattern, rewrite, check, level=3))
