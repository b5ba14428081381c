"""where(mask, x, 0) -> unpack_tokens(pack_tokens(x, indices of mask), mask); likewise what a pooling reads.

A mean over real tokens reads no others; a pooling that takes the first token reads a real one wherever the
mask holds it. Where the last layer computes that token alone, its attention reads keys and values of real
tokens only, of which every sequence then has one. Alone this moves tokens there and back: ``hoist_pack`` then
moves the packing up to the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.attention import SWALLOWS
from graphopt.kernels.masked_mean_pool import OP as MASKED_MEAN_POOL
from graphopt.kernels.pack_tokens import OP as PACK
from graphopt.kernels.unpack_tokens import OP as UNPACK
from graphopt.passes._packing import (
    already_made,
    as_condition,
    attended_tokens,
    indices_of,
    made_from,
    masks_keys,
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
        read, given, mask = _read(graph, node)
        if mask is None or any(x.target is UNPACK.overload for x in read):
            continue
        # what says the same belongs to the region: as inputs they would be varied apart
        made = already_made(mask)
        packs = [pack for indices, packs in packs_by_tokens(graph) if indices in made for pack in packs]
        inside = {*made_from(given, mask), *made, *packs_of(read, packs)} - {node}
        guarded = () if node.target in _UNGUARDED else (mask,)  # see ``reads_first``
        bindings = {"x": read[0], "read": read, "mask": mask, "guarded": guarded}
        yield Match(graph, node, (*sorted(inside), node), bindings)


def check(match: Match) -> str | None:
    """The mask comes with the inputs, with a value for each token."""
    mask, tokens = match.val("mask").shape, match.val("x").shape[:2]
    if same_size(tokens[1], 1):
        return "there is one token a sequence"
    if not same_shape(mask, tokens):
        return f"the mask has shape {list(mask)}, the tokens {list(tokens)}"
    constant = match.constant("mask") is not None
    return "the mask is a constant: it pads the same positions at every call" if constant else None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Take the real tokens out, and put them back for what reads them."""
    node: fx.Node = match.root
    condition = as_condition(rewriter, match["mask"])
    restored: dict[fx.Node, fx.Node] = {}
    for x in dict.fromkeys(match["read"]):
        taken = shared(rewriter, PACK.overload, x, indices_of(rewriter, condition))
        restored[x] = rewriter.call(UNPACK.overload, taken, condition)
    if node.target in _CHOICES:
        rewriter.replace(node, restored[match["x"]])
        return
    args = [restored.get(given, given) if isinstance(given, fx.Node) else given for given in node.args]
    rewriter.replace(node, rewriter.call(node.target, *args, **node.kwargs))  # type: ignore[arg-type]


def reads_first(graph: Graph) -> bool:
    """True when a graph takes for granted that every sequence begins with a real token.

    It reads the first position of packed tokens as if no mask could ever pad it, or attends to them as if
    there always were one. Such a graph may only be run on masks of which that is true.
    """
    restored = graph.fx.find_nodes(op="call_function", target=UNPACK.overload)
    return any(user.target in _GUARDED for node in restored for user in node.users)


def _read(graph: Graph, node: fx.Node) -> tuple[Sequence[fx.Node], Any, fx.Node | None]:
    """What is read, the mask as it is given there, and what that is made of; None for any other call."""
    if node.target is MASKED_MEAN_POOL.overload:
        return node.args[:1], node.args[1], token_mask(node.args[1])  # type: ignore[return-value]
    if node.target in _CHOICES and len(node.args) == 3 and node.args[2] == 0:
        x: Any = node.args[1]
        return (x,), node.args[0], _column(node.args[0], node)
    if _takes_first(node):
        x = node.args[0]
        mask = attended_tokens(graph) if _holds_tokens(x) else None
        return (x,), mask, mask if mask is not None and mask.op == "placeholder" else None
    if node.target is ATTENTION.overload and same_size(node.meta["val"].shape[1], 1):
        mask = argument(node, "mask")
        return node.args[1:3], mask, _of_keys(node, mask)  # type: ignore[return-value]
    return (), None, None


def _takes_first(node: fx.Node) -> bool:
    """True for a call that takes the first position of each sequence."""
    if node.target is aten.select.int:
        return bool(argument(node, "index") == 0 and argument(node, "dim") == 1)
    if node.target is not aten.slice.Tensor or argument(node, "dim") != 1:
        return False
    return bool(argument(node, "start") in (0, None) and argument(node, "end") == 1)


def _of_keys(attention: fx.Node, mask: Any) -> fx.Node | None:
    """The mask of tokens without which an attention's keys have no weight; None where there is none such."""
    fill, key = argument(attention, "fill"), attention.args[1].meta["val"]  # type: ignore[union-attr]
    if mask is None or mask.meta["val"].dtype != torch.bool or argument(attention, "is_causal"):
        return None
    swallowed = fill is None or fill <= SWALLOWS
    return token_mask(mask) if swallowed and masks_keys(mask, key.shape) else None


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
_UNGUARDED = (*_CHOICES, MASKED_MEAN_POOL.overload)
_GUARDED = (aten.select.int, aten.slice.Tensor, ATTENTION.overload)

PASS = register(Pass("pack_tokens", "prune", pattern, rewrite, check, opens=("hoist_pack",)))
