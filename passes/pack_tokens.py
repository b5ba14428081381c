"""where(mask, x, 0) -> unpack_tokens(pack_tokens(x, indices of mask), mask); likewise what a pooling reads.

A mean over real tokens reads no others, nor does a product with a mask, or with weights that are zero with
it, or a maximum that sees -inf at all others; a pooling that takes the first token reads a real one wherever
the mask holds it. Where the last layer computes that token alone, its attention reads keys and values of real
tokens only, of which every sequence then has one. Alone this moves tokens there and back: ``hoist_pack`` then
moves the packing up to the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size
from graphopt.ir.pattern import Match
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.pack_tokens import OP as PACK
from graphopt.kernels.unpack_tokens import OP as UNPACK
from graphopt.passes._packing import (
    already_made,
    as_condition,
    indices_of,
    packs_by_tokens,
    packs_of,
    shared,
)
from graphopt.passes._reads import between, read

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """Every place that reads real tokens only, and its mask."""
    for node in graph.calls:
        if node._erased:
            continue
        found = read(graph, node)
        if found is None or any(x.target is UNPACK.overload for x in found.values):
            continue
        # what says the same belongs to the region: as inputs they would be varied apart
        values, mask = found.values, found.mask
        made = already_made(mask)
        packs = [pack for indices, packs in packs_by_tokens(graph) if indices in made for pack in packs]
        inside = {*between(mask, found.by), *made, *packs_of(values, packs)} - {node}
        guarded = (mask,) if found.guarded else ()  # see ``reads_first``
        bindings = {"x": values[0], "read": values, "mask": mask, "guarded": guarded}
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
    if node.target is aten.where.ScalarOther and node.args[2] == 0:
        rewriter.replace(node, restored[match["x"]])  # what is put back is zero elsewhere
        return
    args = [restored.get(given, given) if isinstance(given, fx.Node) else given for given in node.args]
    rewriter.replace(node, rewriter.call(node.target, *args, **node.kwargs))  # type: ignore[arg-type]


def reads_first(graph: Graph) -> bool:
    """True when a graph takes for granted that every sequence begins with a token that the mask marks with 1.

    It reads the first position of packed tokens, or the first real one, as if no mask could ever pad it, or
    attends to them as if there always were one. Such a graph may only be run on masks of which that is true.
    """
    restored = graph.fx.find_nodes(op="call_function", target=UNPACK.overload)
    return any(user.target in _GUARDED for node in restored for user in node.users)


_GUARDED = (aten.select.int, aten.slice.Tensor, aten.gather.default, ATTENTION.overload)

PASS = register(Pass("pack_tokens", "prune", pattern, rewrite, check, opens=("hoist_pack",)))
