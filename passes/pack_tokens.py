"""where(mask, x, 0) -> unpack_tokens(pack_tokens(x, indices of mask), mask); likewise what a pooling reads.

A mean over real tokens reads no others; a pooling that takes the first token reads a real one wherever the
mask holds it. Alone this moves tokens there and back: ``hoist_pack`` then moves the packing up to the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.masked_mean_pool import OP as MASKED_MEAN_POOL
from graphopt.kernels.pack_tokens import OP as PACK
from graphopt.kernels.unpack_tokens import OP as UNPACK
from graphopt.passes._packing import (
    already_made,
    as_condition,
    attended_tokens,
    indices_of,
    made_from,
    packs_by_tokens,
    packs_of,
    shared,
    token_mask,
)

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every place that reads real tokens only, and its mask."""
    for node in graph.calls:
        if node._erased:
            continue
        x, given, mask = _read(graph, node)
        if not isinstance(x, fx.Node) or mask is None or x.target is UNPACK.overload:
            continue
        # what says the same belongs to the region: as inputs they would be varied apart
        made = already_made(mask)
        packs = [pack for indices, packs in packs_by_tokens(graph) if indices in made for pack in packs]
        inside = {*made_from(given, mask), *made, *packs_of([x], packs)} - {node}
        first = (
            node.target is aten.select.int
        )  # is the original's where it is a real token: see ``reads_first``
        bindings = {"x": x, "mask": mask, "guarded": (mask,) if first else ()}
        yield Match(graph, node, (*sorted(inside), node), bindings)


def check(match: Match) -> str | None:
    """The mask comes with the inputs, with a value for each token."""
    mask, tokens = match.val("mask").shape, match.val("x").shape[:2]
    if not same_shape(mask, tokens):
        return f"the mask has shape {list(mask)}, the tokens {list(tokens)}"
    if match.constant("mask") is not None:
        return "the mask is a constant: it pads the same positions at every call"
    return "there is one token a sequence" if same_size(tokens[1], 1) else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Take the real tokens out, and put them back for what reads them."""
    node, x = match.root, match["x"]
    condition = as_condition(rewriter, match["mask"])
    taken = shared(rewriter, PACK.overload, x, indices_of(rewriter, condition))
    restored = rewriter.call(UNPACK.overload, taken, condition)
    if node.target in _CHOICES:
        rewriter.replace(node, restored)
    else:
        args = [restored if given is x else given for given in node.args]
        rewriter.replace(node, rewriter.call(node.target, *args, **node.kwargs))  # type: ignore[arg-type]


def reads_first(graph: Graph) -> bool:
    """True when a graph reads the first position of packed tokens, as if no mask could ever pad it.

    Such a graph may only be run on masks that do not.
    """
    restored = graph.fx.find_nodes(op="call_function", target=UNPACK.overload)
    return any(user.target is aten.select.int for node in restored for user in node.users)


def _read(graph: Graph, node: fx.Node) -> tuple[Any, Any, fx.Node | None]:
    """What is read, the mask as it is given there, and what that is made of."""
    if node.target is MASKED_MEAN_POOL.overload:
        return node.args[0], node.args[1], token_mask(node.args[1])
    if node.target in _CHOICES and len(node.args) == 3 and node.args[2] == 0:
        return node.args[1], node.args[0], _column(node.args[0], node)
    if node.target is aten.select.int and argument(node, "index") == 0 and argument(node, "dim") == 1:
        x: Any = node.args[0]
        mask = attended_tokens(graph) if _holds_tokens(x) else None
        return (x, mask, mask) if mask is not None and mask.op == "placeholder" else (None, None, None)
    return None, None, None


def _holds_tokens(x: fx.Node) -> bool:
    """True for what a layer computes for each token."""
    return x.op == "call_function" and x.meta["val"].dim() == 3 and x.meta["val"].is_floating_point()


def _column(condition: Any, node: fx.Node) -> fx.Node | None:
    """The mask behind a condition that has one value for all features of a token."""
    rank = node.meta["val"].dim()
    if not isinstance(condition, fx.Node) or condition.meta["val"].dim() != rank:
        return None
    sizes = condition.meta["val"].shape
    return token_mask(condition) if all(same_size(size, 1) for size in sizes[2:]) else None


_CHOICES = (aten.where.ScalarOther,)

PASS = register(Pass("pack_tokens", "prune", pattern, rewrite, check, opens=("hoist_pack",)))
