"""sum(x * mask, 1) / clamp(sum(mask, 1), min=c) -> masked_mean_pool(x, mask, c): sentence embeddings.

The sum may be spelled as a product of matrices: bmm, matmul or einsum of mask and tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.masked_mean_pool import OP as MASKED_MEAN_POOL

aten = torch.ops.aten

_CLAMPS = (aten.clamp.default, aten.clamp_min.default)
_PRODUCTS = (aten.bmm.default, aten.matmul.default, aten.einsum.default)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every quotient of a masked sum over tokens and the sum of that mask."""
    for total, x, weight, nodes in _totals(graph):
        for quotient in list(total.users):
            if quotient.target is aten.div.Tensor and quotient.args[0] is total:
                found = _match(graph, quotient, nodes, x, weight)
                if found is not None:
                    yield found


def check(match: Match) -> str | None:
    """One type, a mask for each token, and nothing else reads the sums."""
    x, mask = match.val("x"), match.val("mask")
    if match.root.meta["val"].dtype != x.dtype:
        return f"the mean is {match.root.meta['val'].dtype}, of values that are {x.dtype}"
    if not same_shape(mask.shape, x.shape[:2]):
        return f"the mask has shape {list(mask.shape)}, the tokens {list(x.shape[:2])}"
    shared = shared_inside(match, match["views"])
    return f"{shared[0].name} is also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """One pass over the tokens."""
    call = rewriter.call(MASKED_MEAN_POOL.overload, match["x"], match["mask"], match["minimum"])
    rewriter.replace(match.root, call)


_Total = tuple[fx.Node, Any, Any, list[fx.Node]]  # a sum, the tokens, their weights, the calls up to the sum


def _totals(graph: Graph) -> Iterator[_Total]:
    """Every weighted sum over tokens, (batch, features), in both orders of its operands."""
    for total in graph.fx.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        product = None if total._erased else _summed(total)
        if product is not None and product.target is aten.mul.Tensor:
            for x, weight in (product.args[:2], product.args[1::-1]):
                if isinstance(x, fx.Node) and same_shape(x.meta["val"].shape, product.meta["val"].shape):
                    yield total, x, weight, [product, total]
    for target in _PRODUCTS:
        for product in graph.fx.find_nodes(op="call_function", target=target):
            if not product._erased:
                yield from _of_matrices(product)


def _of_matrices(product: fx.Node) -> Iterator[_Total]:
    """The sum as mask (B, 1, T) by tokens (B, T, D), or tokens (B, D, T) by mask (B, T, 1), or einsum."""
    if product.target is aten.einsum.default:
        equation, operands = str(product.args[0]).replace(" ", ""), list(product.args[1])  # type: ignore[arg-type]
        for x, weight in (operands, operands[::-1]) if len(operands) == 2 else ():
            left, _, right = equation.partition("->")[0].partition(",")
            tokens = left if x is operands[0] else right
            b, t, d = tokens if len(tokens) == len(set(tokens)) == 3 and tokens.isalpha() else "..."
            if equation in (f"{b}{t}{d},{b}{t}->{b}{d}", f"{b}{t},{b}{t}{d}->{b}{d}"):
                yield product, x, weight, [product]
        return
    left, right = product.args[:2]
    rows, features = product.meta["val"].shape[-2:]
    for dim, size, x, weight in ((1, rows, right, left), (2, features, left, right)):
        total = next(iter(product.users)) if len(product.users) == 1 else None
        if product.meta["val"].dim() != 3 or not same_size(size, 1) or not _drops(total, dim):
            continue
        column, views = _unsqueezed(weight, dim)
        turned, more = (x, []) if dim == 1 else _transposed(x)
        if column is not None and turned is not None and isinstance(total, fx.Node):
            yield total, turned, column, [*views, *more, product, total]


def _drops(node: fx.Node | None, dim: int) -> bool:
    """True for a call that leaves a dimension of size 1 out."""
    if node is None or node.target not in (aten.squeeze.dim, aten.select.int, aten.squeeze.dims):
        return False
    dims: Any = argument(node, "dim")
    given = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    first = node.target is not aten.select.int or argument(node, "index") in (0, -1)
    return first and [d % 3 for d in given] == [dim]


def _unsqueezed(node: Any, dim: int) -> tuple[fx.Node | None, list[fx.Node]]:
    """What has a dimension put on there, through casts."""
    views: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        views.append(node)
        if node.target is aten.unsqueeze.default:
            source: Any = node.args[0]
            fits = node.meta["val"].dim() == 3 and argument(node, "dim") % 3 == dim
            return (source, views) if fits else (None, [])
        if not _widens(node):
            break
        node = node.args[0]
    return None, []


def _transposed(node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    if isinstance(node, fx.Node) and node.target is aten.transpose.int:
        dims = {dim % 3 for dim in node.args[1:]}  # type: ignore[operator]
        return (node.args[0], [node]) if dims == {1, 2} else (None, [])  # type: ignore[return-value]
    return None, []


def _match(graph: Graph, quotient: fx.Node, total: list[fx.Node], x: Any, weight: Any) -> Match | None:
    """The match, when the divisor is the sum of the very mask that ``x`` is weighted with."""
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or x.meta["val"].dim() != 3:
        return None
    mask, views = _token_mask(weight)
    count, minimum, inner = _count(quotient.args[1])
    if mask is None or count is None:
        return None
    summed, more = _token_mask(count)
    if summed is not mask:
        return None
    views = [*views, *more, *(node for node in total if _is_view(node))]
    nodes = tuple(sorted({*views, *inner, *total, quotient}))
    return Match(graph, quotient, nodes, {"x": x, "mask": mask, "minimum": minimum, "views": views})


def _is_view(node: fx.Node) -> bool:
    """True for what stays for its other readers."""
    return node.target in (aten.unsqueeze.default, aten.transpose.int) or _widens(node)


def _summed(total: Any) -> fx.Node | None:
    """What is summed over dimension 1, or None."""
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return None
    source: Any = total.args[0]
    dims: Any = argument(total, "dim")
    rank = source.meta["val"].dim()
    return source if isinstance(dims, (list, tuple)) and [dim % rank for dim in dims] == [1] else None


def _token_mask(node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    """The mask of shape (batch, tokens) behind casts to a type that holds it, and a last dimension put on."""
    views: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        source: Any = node.args[0] if node.args else None
        if node.target is aten.unsqueeze.default:
            passes = node.meta["val"].dim() == 3 and argument(node, "dim") in (-1, 2)
        elif node.target is aten.expand.default:
            val = source.meta["val"]
            passes = val.dim() == 3 and same_size(val.shape[2], 1)
        else:
            passes = _widens(node)
        if not passes:
            break
        views.append(node)
        node = source
    fits = isinstance(node, fx.Node) and node.meta["val"].dim() == 2
    return (node, views) if fits else (None, views)


def _count(node: Any) -> tuple[fx.Node | None, float | None, list[fx.Node]]:
    """What the divisor sums over the tokens, its minimum, and the nodes in between."""
    nodes: list[fx.Node] = []
    minimum = None
    while isinstance(node, fx.Node) and node.op == "call_function":
        nodes.append(node)
        if node.target in _CLAMPS and minimum is None:
            minimum = argument(node, "min")
            plain = node.target is aten.clamp_min.default or argument(node, "max") is None
            if not plain or not isinstance(minimum, (int, float)):
                break
        elif node.target is aten.sum.dim_IntList:
            summed = _summed(node)
            # (batch, tokens) keeps a dimension to divide by, or gets it back
            kept = argument(node, "keepdim") or any(n.target is aten.unsqueeze.default for n in nodes)
            per_row = summed is not None and summed.meta["val"].dim() == 2
            fits = summed is not None and (bool(kept) if per_row else not argument(node, "keepdim"))
            return (summed if fits else None), None if minimum is None else float(minimum), nodes
        elif not _puts_a_column(node) and not _widens(node):
            break
        node = node.args[0]
    return None, None, nodes


def _puts_a_column(node: fx.Node) -> bool:
    return node.target is aten.unsqueeze.default and argument(node, "dim") in (-1, 1)


def _widens(node: fx.Node) -> bool:
    """True for a cast to a floating type, which holds what a mask holds."""
    return node.target is aten.to.dtype and bool(node.meta["val"].dtype.is_floating_point)


PASS = register(Pass("fuse_masked_mean_pool", "fuse", pattern, rewrite, check))
