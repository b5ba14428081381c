"""cross_entropy(linear(x, w, b), y) or nll_loss(log_softmax(linear(x, w, b)), y) -> linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match, argument, shared_inside
from graphopt.kernels.linear_cross_entropy import OP as LINEAR_CROSS_ENTROPY

aten = torch.ops.aten

_REDUCTIONS = ("none", "mean", "sum")


def pattern(graph: Graph) -> Iterator[Match]:
    """Every loss whose logits come from a projection."""
    for target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default):
        for loss in graph.fx.find_nodes(op="call_function", target=target):
            logits: Any = loss.args[0]
            inside = [loss]
            if target is not aten.cross_entropy_loss.default:
                if logits.target is not aten.log_softmax.int or argument(logits, "dtype") is not None:
                    continue
                if logits.args[1] % logits.meta["val"].dim() != logits.meta["val"].dim() - 1:
                    continue
                inside.append(logits)
                logits = logits.args[0]
            moved = _moves(logits)
            linear = moved[-1].args[0] if moved else logits
            if isinstance(linear, fx.Node) and linear.target is aten.linear.default:
                nodes = tuple(sorted([linear, *moved, *inside]))
                yield Match(graph, loss, nodes, {"linear": linear, "moves": moved[::-1], "logits": logits})


def check(match: Match) -> str | None:
    """One class a row, plain weights, and nothing else reads the logits: they are never all there."""
    loss, logits = match.root, match.val("logits")
    labels = argument(loss, "target").meta["val"]
    if logits.dim() != 2 or labels.dim() != 1:
        return f"the logits have {logits.dim()} dimensions and the labels {labels.dim()}, not 2 and 1"
    if argument(loss, "weight") is not None:
        return "the classes have weights"
    smoothing = loss.target is aten.cross_entropy_loss.default and argument(loss, "label_smoothing")
    if smoothing:
        return f"the labels are smoothed by {smoothing}"
    if labels.dtype != torch.int64:
        return f"the labels are {labels.dtype}, not torch.int64"
    shared = shared_inside(match)
    return f"the logits ({shared[0].name}) are also read by {shared[1].name}" if shared else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Move the features as the logits were, then project and sum block by block."""
    linear, loss = match["linear"], match.root
    x, weight, bias = (argument(linear, name) for name in ("input", "weight", "bias"))
    wide = False
    for move in match["moves"]:
        if move.target is aten.to.dtype:
            wide = True
        elif move.target is aten.reshape.default:
            x = rewriter.call(aten.reshape.default, x, [-1, x.meta["val"].shape[-1]])
        else:
            x = rewriter.call(move.target, x, *move.args[1:], **move.kwargs)
    reduction = _REDUCTIONS[argument(loss, "reduction")]
    options = (argument(loss, "ignore_index"), reduction, wide)
    labels = argument(loss, "target")
    fused = rewriter.call(LINEAR_CROSS_ENTROPY.overload, x, weight, bias, labels, *options)
    rewriter.replace(loss, fused)


def _moves(node: Any) -> list[fx.Node]:
    """What lies between the projection and the loss, the last first: casts, slices of tokens, flattening."""
    found: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and _is_move(node):
        found.append(node)
        node = node.args[0]
    return found


def _is_move(node: fx.Node) -> bool:
    """True for what does the same to rows of features as to rows of logits."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], torch.Tensor):
        return False
    before, after = source.meta["val"], node.meta["val"]
    if node.target is aten.to.dtype:
        return bool(after.dtype == torch.float32) and before.dtype.is_floating_point
    if node.target is aten.reshape.default:
        return after.dim() == 2 and same_size(before.shape[-1], after.shape[-1])
    if node.target in (aten.slice.Tensor, aten.select.int):
        return bool(argument(node, "dim") % before.dim() != before.dim() - 1)
    return (
        node.target is aten.index.Tensor
        and same_shape(before.shape[-1:], after.shape[-1:])
        and before.dim() == 2
    )


PASS = register(Pass("fuse_linear_cross_entropy", "fuse", pattern, rewrite, check))
