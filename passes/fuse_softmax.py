"""exp(x - max(x)) / sum(exp(x - max(x))) -> softmax(x), and so log_softmax and logsumexp spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, is_getitem, same_shape
from graphopt.ir.pattern import Match, argument, shared_inside

aten = torch.ops.aten

_MAXIMUM = (aten.amax.default, aten.max.dim)
_SUM = (aten.sum.dim_IntList,)
_LOGSUMEXP = (aten.logsumexp.default,)


def pattern(graph: Graph) -> Iterator[Match]:
    """What is made of an exponential and its sum, or of a logsumexp."""
    for exp in graph.fx.find_nodes(op="call_function", target=aten.exp.default):
        if not exp._erased:
            yield from _of_exponential(graph, exp)
    for sub in graph.fx.find_nodes(op="call_function", target=aten.sub.Tensor):
        if not sub._erased:
            yield from _minus_logsumexp(graph, sub)
    for log in graph.fx.find_nodes(op="call_function", target=aten.log.default):
        soft: Any = log.args[0]
        if not log._erased and soft.target is aten.softmax.int and soft.args[2:] in ((), (None,)):
            refusal = "log(softmax(x)) is -inf where softmax underflows, and log_softmax is not"
            yield Match(graph, log, (soft, log), {"refusal": refusal})


def check(match: Match) -> str | None:
    """The maximum was subtracted, and nothing else reads the steps in between."""
    if match.get("refusal") is not None:
        return str(match["refusal"])
    shared = shared_inside(match)
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One op; each keeps its maximum away from overflow itself."""
    rewriter.replace(match.root, rewriter.call(match["target"], match["x"], *match["args"]))


def _of_exponential(graph: Graph, exp: fx.Node) -> Iterator[Match]:
    """Softmax, log_softmax and logsumexp of what an exponential is taken of."""
    source: Any = exp.args[0]
    if source.target is aten.log_softmax.int and source.args[2:] in ((), (None,)):
        bound = {"x": source.args[0], "target": aten.softmax.int, "args": (source.args[1],)}
        yield Match(graph, exp, (source, exp), bound)
        return
    for total in list(exp.users):
        found = _reduction(total, _SUM) if total.target in _SUM else None
        if found is None or argument(total, "dtype") is not None:
            continue
        dim = found[1]
        x, largest, inner = _shifted(source, dim)
        for kept in _kept(total, dim, exp.meta["val"].dim()):
            for last, target, tail in _endings(exp, source, largest, kept, dim):
                nodes = {*inner, exp, total, kept, *tail, last}
                refusal = None if largest is not None else "without the maximum subtracted, exp overflows"
                bound = {"x": x, "target": target, "args": (dim,), "refusal": refusal}
                if target is aten.logsumexp.default:
                    bound["args"] = ([dim], last.meta["val"].dim() == exp.meta["val"].dim())
                yield Match(graph, last, tuple(sorted(nodes)), bound)


def _endings(
    exp: fx.Node, source: fx.Node, largest: fx.Node | None, kept: fx.Node, dim: int
) -> Iterator[tuple[fx.Node, Any, list[fx.Node]]]:
    """Every last step: the node, the op that it completes, and the nodes in front of it."""
    for user in list(kept.users):
        if user.target is aten.div.Tensor and user.args == (exp, kept) and _keeps(user, exp):
            yield user, aten.softmax.int, []
        if user.target is aten.reciprocal.default:
            for product in list(user.users):
                if product.target is aten.mul.Tensor and set(product.args) == {exp, user}:
                    yield product, aten.softmax.int, [user]
        if user.target is aten.log.default:
            for last in list(user.users):
                if last.target is aten.sub.Tensor and last.args == (source, user) and _keeps(last, exp):
                    yield last, aten.log_softmax.int, [user]
                if last.target is aten.add.Tensor and set(last.args) == {largest, user}:
                    yield last, aten.logsumexp.default, [user]


def _minus_logsumexp(graph: Graph, sub: fx.Node) -> Iterator[Match]:
    x, kept = sub.args[:2]
    found = _through_unsqueeze(kept, _LOGSUMEXP)
    if found is None or found[0] is not x or argument(sub, "alpha") != 1 or not _keeps(sub, x):
        return
    _, dim, inner = found
    yield Match(
        graph, sub, (*inner, sub), {"x": x, "target": aten.log_softmax.int, "args": (dim,), "refusal": None}
    )


def _shifted(source: fx.Node, dim: int) -> tuple[fx.Node, fx.Node | None, list[fx.Node]]:
    """What the maximum along ``dim`` was subtracted from, that maximum, and the nodes in between."""
    if source.target is aten.sub.Tensor and argument(source, "alpha") == 1:
        x, largest = source.args[:2]
        found = _through_unsqueeze(largest, _MAXIMUM)
        if found is not None and found[0] is x and found[1] == dim:
            return found[0], largest, [*found[2], source]  # type: ignore[return-value]
    return source, None, []


def _through_unsqueeze(node: Any, targets: tuple[Any, ...]) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """Source, dimension and nodes of a reduction that keeps its dimension, or gets it back."""
    nodes: list[fx.Node] = []
    while isinstance(node, fx.Node) and (node.target is aten.unsqueeze.default or is_getitem(node)):
        if is_getitem(node) and node.args[1] != 0:
            return None
        nodes.insert(0, node)
        node = node.args[0]
    found = _reduction(node, targets)
    if found is None:
        return None
    source, dim = found
    inserted = [n for n in nodes if n.target is aten.unsqueeze.default]
    if argument(node, "keepdim"):
        fits = not inserted
    else:
        rank = source.meta["val"].dim()
        fits = len(inserted) == 1 and argument(inserted[0], "dim") % rank == dim
    return (source, dim, [node, *nodes]) if fits else None


def _reduction(node: Any, targets: tuple[Any, ...]) -> tuple[fx.Node, int] | None:
    """Source and dimension of a reduction along one dimension."""
    if not isinstance(node, fx.Node) or node.target not in targets:
        return None
    source: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or source.meta["val"].dim() == 0:
        return None
    return source, dims[0] % source.meta["val"].dim()


def _kept(total: fx.Node, dim: int, rank: int) -> Iterator[fx.Node]:
    """The sum in the forms in which others read it: with its dimension, put back where it is lost."""
    if argument(total, "keepdim"):
        yield total
        return
    for user in list(total.users):
        if user.target is aten.unsqueeze.default and argument(user, "dim") % rank == dim:
            yield user


def _keeps(node: fx.Node, like: Any) -> bool:
    """True when nothing was broadcast to more than the exponentials."""
    return same_shape(node.meta["val"].shape, like.meta["val"].shape)


PASS = register(Pass("fuse_softmax", "fuse", pattern, rewrite, check))
