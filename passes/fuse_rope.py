"""x * cos + rotate_half(x) * sin, cos and sin of angles written twice -> rope(x, cos, sin), tokens first."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Call, Match, Var, argument, shared_inside
from graphopt.kernels.rope import OP as ROPE
from graphopt.passes._scalars import tensor

aten = torch.ops.aten
add, mul = aten.add.Tensor, aten.mul.Tensor
_END = 2**63 - 1


def _half(name: str, start: Any, end: Any) -> Call:
    dims = Var(f"{name}_dim", lambda dim: dim in (3, -1), "the last dimension")
    return Call(aten.slice.Tensor, Var("x"), dims, start, end)


_x = tensor("x", rank=4)
_rotated = Call(
    aten.cat.default,
    [
        Call(aten.neg.default, _half("upper", Var("middle"), Var("end"))),
        _half("lower", Var("start", lambda v: v in (0, None)), Var("middle")),
    ],
    Var("axis", lambda dim: dim in (3, -1), "the last dimension"),
)
_straight = Call(mul, _x, tensor("cos"), commutative=True)
_turned = Call(mul, _rotated, tensor("sin"), commutative=True)

pattern = Call(add, _straight, _turned, commutative=True)


def check(match: Match) -> str | None:
    """Halves must be halves, and the tables must hold every angle twice."""
    x = match.val("x")
    width = x.shape[-1]
    middle = match["middle"]
    halves = isinstance(width, int) and isinstance(middle, int) and middle * 2 == width
    if not halves or match["end"] not in (width, None, _END):
        return f"the rotated parts are not the halves of {width} features"
    shared = shared_inside(match)
    if shared:
        return f"{shared[0].name} is also read by {shared[1].name}"
    for name in ("cos", "sin"):
        shape = match.val(name).shape
        if len(shape) != 4 or shape[1] != 1 or shape[-1] != width:
            return f"the {name} table has shape {list(shape)}, not (batch, 1, tokens, {width})"
        if not (same_size(shape[0], 1) or same_size(shape[0], x.shape[0])) or not same_size(
            shape[2], x.shape[2]
        ):
            return f"the {name} table has shape {list(shape)}, which does not fit {list(x.shape)}"
        if match.val(name).dtype != x.dtype:
            return f"the {name} table is {match.val(name).dtype}, not {x.dtype}"
        if not _written_twice(match.graph, match[name]):
            return f"the {name} table is not known to hold each angle twice"
    if not same_shape(match.val("cos").shape, match.val("sin").shape):
        return "the two tables differ in shape"
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Half tables, tokens first; the transposes cancel against those already there."""
    tables = [_half_table(rewriter, match, name) for name in ("cos", "sin")]
    tokens_first = rewriter.call(aten.transpose.int, match["x"], 1, 2)
    turned = rewriter.call(ROPE.overload, tokens_first, *tables)
    rewriter.replace(match.root, rewriter.call(aten.transpose.int, turned, 1, 2))


def _half_table(rewriter: Rewriter, match: Match, name: str) -> fx.Node:
    """(batch, tokens, width / 2), from the angles as they were before they were written twice."""
    table = match[name]
    if table.target is aten.unsqueeze.default and argument(table, "dim") == 1:
        return _halved(rewriter, table.args[0])
    return rewriter.call(aten.squeeze.dim, _halved(rewriter, table), 1)


def _halved(rewriter: Rewriter, node: Any) -> fx.Node:
    """The first half of the last dimension; ``_written_twice`` holds for the node."""
    if node.op == "get_attr":
        last = node.meta["val"].dim() - 1
        return rewriter.call(aten.slice.Tensor, node, last, 0, node.meta["val"].shape[last] // 2)
    if node.target is aten.cat.default:
        part: fx.Node = node.args[0][0]
        return part
    source, *rest = node.args
    if node.target is aten.expand.default:
        rest = [[*rest[0][:-1], -1]]
    return rewriter.call(node.target, _halved(rewriter, source), *rest, **node.kwargs)


def _written_twice(graph: Graph, node: Any) -> bool:
    """True when the last dimension is ``cat([a, a])`` behind pointwise ops and inserted dimensions."""
    while isinstance(node, fx.Node):
        last = node.meta["val"].dim() - 1
        constant = graph.constant(node)
        if constant is not None:
            middle = constant.shape[-1] // 2
            return torch.equal(constant[..., :middle], constant[..., middle:])
        if node.op != "call_function":
            return False
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            return len(parts) == 2 and parts[0] is parts[1] and argument(node, "dim") in (-1, last)
        source: Any = node.args[0]
        if node.target in (aten.expand.default, aten.unsqueeze.default):
            if not same_size(node.meta["val"].shape[-1], source.meta["val"].shape[-1]):
                return False
            if node.target is aten.unsqueeze.default and argument(node, "dim") in (-1, last):
                return False
        elif node.target is mul:
            if not isinstance(node.args[1], (int, float)):
                return False
        elif node.target not in _POINTWISE:
            return False
        node = source
    return False


_POINTWISE = (aten.cos.default, aten.sin.default, aten.to.dtype)

PASS = register(Pass("fuse_rope", "fuse", pattern, rewrite, check))
