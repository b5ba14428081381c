"""attention(q * c, k, v, scale=s) -> attention(q, k, v, scale=s * c), and for k alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes._affine import MOVES, Affine, as_affine
from graphopt.passes._layers import also_read, with_arguments

aten = torch.ops.aten

_ATTENTIONS = (ATTENTION.overload, aten.scaled_dot_product_attention.default)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every attention whose query or key is one number times another value, moved into place or not."""
    for target in _ATTENTIONS:
        for node in graph.fx.find_nodes(op="call_function", target=target):
            for side in ("query", "key"):
                found = None if node._erased else _match(graph, node, side)
                if found is not None:
                    yield found
                    break  # the other side is looked at in the next round


def _match(graph: Graph, node: fx.Node, side: str) -> Match | None:
    moves: list[fx.Node] = []
    source: Any = argument(node, side)
    while isinstance(source, fx.Node) and source.target in MOVES:
        moves.insert(0, source)
        source = source.args[0]
    step = as_affine(graph, source) if isinstance(source, fx.Node) else None
    if not isinstance(step, Affine) or step.scale.numel() != 1 or step.shift is not None:
        return None
    found = {"side": side, "step": step, "moves": moves}
    return Match(graph, node, (source, *moves, node), found)


def check(match: Match) -> str | None:
    """The factor must be above zero, and nobody else may read the product."""
    factor, size = match["step"].scale.item(), argument(match.root, "query").meta["val"].shape[-1]
    if not (factor > 0 and math.isfinite(factor)):
        return f"a scale must be above zero, not {factor:.6g}"
    if argument(match.root, "scale") is None and not isinstance(size, int):
        return "the number of features varies: the default scale is no number"
    for value, reader in itertools.pairwise(match.nodes):
        reason = also_read(value, reader)
        if reason is not None:
            return reason
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Read the value itself."""
    value, scale = match["step"].source, argument(match.root, "scale")
    for move in match["moves"]:
        value = rewriter.call(move.target, value, *move.args[1:], **move.kwargs)
    if scale is None:
        scale = argument(match.root, "query").meta["val"].shape[-1] ** -0.5
    changes: dict[str, Any] = {match["side"]: value, "scale": scale * match["step"].scale.item()}
    rewriter.replace(match.root, with_arguments(rewriter, match.root, **changes))


PASS = register(Pass("fold_attention_scale", "fold", pattern, rewrite, check))
