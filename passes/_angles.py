"""Tables of rotary embeddings: which of their columns are known to be equal, and how to compute only some."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_size
from graphopt.ir.pattern import argument

aten = torch.ops.aten

_POINTWISE = (aten.cos.default, aten.sin.default, aten.to.dtype, aten.neg.default)
_SHAPED = (aten.expand.default, aten.reshape.default)
_WITH_DIM = (
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.index_select.default,
)
_ALONG = (aten.slice.Tensor, aten.cat.default, aten.repeat_interleave.self_int)


def columns(graph: Graph, node: Any, part: str = "") -> torch.Tensor:
    """A number for each column of a table; columns of one number are equal for every input.

    Args:
        graph: the graph.
        node: the table, (..., columns), its last dimension fixed.
        part: "real" or "imag" for one part of a complex table.
    """
    width = node.meta["val"].shape[-1]
    constant = graph.constant(node)
    if constant is not None:
        constant = getattr(constant, part) if part else constant
        found: torch.Tensor = torch.unique(constant.reshape(-1, width), dim=1, return_inverse=True)[1]
        return found
    rule = node.target if node.op == "call_function" else None
    last = node.meta["val"].dim() - 1
    if rule is aten.cat.default and argument(node, "dim") in (-1, last):
        return _numbered(graph, node.args[0], part)
    if rule is aten.repeat_interleave.self_int and argument(node, "dim") in (-1, last):
        return columns(graph, node.args[0], part).repeat_interleave(node.args[1])
    pair = _written_in_pairs(node)
    if pair is not None:
        return columns(graph, pair, part).repeat_interleave(2)
    if rule is aten.slice.Tensor and argument(node, "dim") in (-1, last):
        start, end, step = (argument(node, name) for name in ("start", "end", "step"))
        return columns(graph, node.args[0], part)[start:end:step]
    if rule is aten.embedding.default:
        return columns(graph, node.args[0], part)
    source = _of_same_columns(node)
    return torch.arange(width) if source is None else columns(graph, source, part)


def _numbered(graph: Graph, nodes: Any, part: str) -> torch.Tensor:
    """The columns of several tables side by side: those of one table twice are equal."""
    found, offset = {}, 0
    for node in dict.fromkeys(nodes):
        found[node] = columns(graph, node, part) + offset
        offset += node.meta["val"].shape[-1]
    return torch.cat([found[node] for node in nodes])


def _written_in_pairs(node: Any) -> Any:
    """a of ``reshape(stack([a, a], -1), (..., 2 n))``."""
    stack = node.args[0] if node.target is aten.reshape.default else None
    if not isinstance(stack, fx.Node) or stack.target is not aten.stack.default:
        return None
    parts: Any = stack.args[0]
    last = argument(stack, "dim") in (-1, stack.meta["val"].dim() - 1)
    fits = last and len(parts) == 2 and parts[0] is parts[1]
    return parts[0] if fits and node.meta["val"].dim() == stack.meta["val"].dim() - 1 else None


def _of_same_columns(node: Any) -> Any:
    """The source whose columns a node's are made of one by one, or None."""
    if node.op != "call_function":
        return None
    source: Any = node.args[0]
    tensors = [value for value in node.args if isinstance(value, fx.Node)]
    rank, width = node.meta["val"].dim(), node.meta["val"].shape[-1]
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
        wide = [value for value in tensors if not same_size(_width(value), 1)]
        return wide[0] if len(wide) == 1 and same_size(_width(wide[0]), width) else None
    elsewhere = node.target in _WITH_DIM
    if elsewhere:
        ranks = max(rank, source.meta["val"].dim())  # before a dimension goes, or after one came
        elsewhere = argument(node, "dim") % ranks != ranks - 1
    indexed = node.target is aten.index.Tensor and len(node.args[1]) < source.meta["val"].dim()
    kept = elsewhere or indexed or node.target in (*_POINTWISE, *_SHAPED)
    fits = kept and isinstance(source, fx.Node) and same_size(_width(source), width)
    return source if fits else None


def _width(node: fx.Node) -> Any:
    val = node.meta["val"]
    return val.shape[-1] if isinstance(val, torch.Tensor) and val.dim() else 1


def take(rewriter: Rewriter, node: Any, start: int, step: int, count: int, part: str = "") -> fx.Node:
    """``count`` columns of a table from ``start`` on, computed without the others where possible.

    Args:
        rewriter: stages the calls.
        node: the table.
        start: the first column.
        step: from one column to the next.
        count: how many.
        part: "real" or "imag" for one part of a complex table.
    """
    width, last = node.meta["val"].shape[-1], node.meta["val"].dim() - 1
    rule = node.target if node.op == "call_function" else None
    along = rule in _ALONG and argument(node, "dim") in (-1, last)
    if rule is aten.slice.Tensor and along:
        before, stride = argument(node, "start") or 0, argument(node, "step")
        if isinstance(before, int) and before >= 0:
            return take(rewriter, node.args[0], before + start * stride, step * stride, count, part)
    if (start, step, count) == (0, 1, width) and not part:
        found: fx.Node = node
        return found
    if rule is aten.cat.default and along and (start, step) == (0, 1) and count <= _width(node.args[0][0]):
        return take(rewriter, node.args[0][0], 0, 1, count, part)
    twice = node.args[0] if rule is aten.repeat_interleave.self_int and along and node.args[1] == 2 else None
    twice = _written_in_pairs(node) if twice is None else twice
    if twice is not None and step % 2 == 0:
        return take(rewriter, twice, start // 2, step // 2, count, part)
    source = _of_same_columns(node)
    if source is not None and source is node.args[0]:
        rest = [[*node.args[1][:-1], count]] if rule in _SHAPED else list(node.args[1:])
        taken = take(rewriter, source, start, step, count, part)
        return rewriter.call(node.target, taken, *rest, **node.kwargs)
    bounds = (start, start + step * (count - 1) + 1, *([step] if step != 1 else []))
    return _taken(rewriter, node, bounds, part)


def _taken(rewriter: Rewriter, node: Any, bounds: tuple[int, ...], part: str) -> fx.Node:
    last = node.meta["val"].dim() - 1
    first = part != "imag"
    if part and node.target is aten.polar.default:
        radius, angle = (_taken(rewriter, side, bounds, "") for side in node.args)
        turned = rewriter.call(aten.cos.default if first else aten.sin.default, angle)
        return rewriter.call(aten.mul.Tensor, radius, turned)
    if part and node.target is aten.complex.default:
        return _taken(rewriter, node.args[0 if first else 1], bounds, "")
    if part:
        pairs = rewriter.call(aten.view_as_real.default, node)
        node = rewriter.call(aten.select.int, pairs, last + 1, 0 if first else 1)
    if bounds == (0, node.meta["val"].shape[-1]):
        found: fx.Node = node
        return found
    return rewriter.call(aten.slice.Tensor, node, last, *bounds)
