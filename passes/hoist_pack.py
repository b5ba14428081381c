"""pack_tokens(f(x)) -> f(pack_tokens(x)); pack_tokens(attention(q, k, v, mask)) -> packed_attention(...).

Nothing is computed at padded positions any more, up to where the tokens come from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_size
from graphopt.ir.pattern import Match, argument, describe
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.kernels.attention import SWALLOWS
from graphopt.kernels.pack_tokens import OP as PACK
from graphopt.kernels.packed_attention import OP as PACKED_ATTENTION
from graphopt.passes._packing import (
    Spot,
    already_made,
    condition_of,
    made_from,
    masks_keys,
    offsets_of,
    packed,
    packs_by_tokens,
    packs_of,
    region,
    shared,
    sizes_of,
    sources,
    token_mask,
    with_tokens,
)

aten = torch.ops.aten


def pattern(graph: Graph) -> Iterator[Match]:
    """One step up at a time, for as long as there is one; then what the packs that are left stand behind."""
    tried: set[tuple[str, ...]] = set()
    while True:
        found = next((match for match in _steps(graph) if _key(match) not in tried), None)
        if found is None:
            return
        tried.add(_key(found))
        yield found


def check(match: Match) -> str | None:
    """Packed attention sees every real token and no other; what is not packed must not need the padding."""
    if match.get("region"):
        return None
    source: fx.Node = match["source"]
    other = next((user for user in source.users if user not in match["packs"]), None)
    if other is not None:
        return f"{source.name} is also read by {other.name}, which needs the padded positions"
    if source.target is not ATTENTION.overload:
        return f"{describe(source)} is not known to keep tokens apart"
    return _refused(match, source)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Compute the same for packed tokens."""
    indices = match["indices"]
    if not match.get("region"):
        _rewrite_attention(rewriter, match["source"], match.root, indices)
        return
    found: dict[fx.Node, Spot] = match["region"]
    new: dict[fx.Node, fx.Node] = {}
    for node in sorted(found):
        behind = sources(node, found[node])
        assert behind is not None
        given = {
            source: new[source] if source in found else packed(rewriter, source, spot, indices)
            for source, spot in behind.items()
        }
        args, kwargs = with_tokens(node, found[node])
        mapped: Any = fx.map_arg((args, kwargs), functools.partial(_given, given))
        new[node] = rewriter.call(node.target, *mapped[0], **mapped[1])  # type: ignore[arg-type]
    for pack in match["packs"]:
        if pack.args[0] in new:
            rewriter.replace(pack, new[pack.args[0]])


def _given(given: dict[fx.Node, fx.Node], source: fx.Node) -> fx.Node:
    return given.get(source, source)


def _steps(graph: Graph) -> Iterator[Match]:
    """Attentions that packs stand behind, regions between attentions, and where neither can go on."""
    for indices, packs in packs_by_tokens(graph):
        attended = [pack for pack in packs if pack.args[0].target is ATTENTION.overload]  # type: ignore[union-attr]
        for pack in attended:
            yield _match(graph, indices, packs, pack)
        found = region(packs)
        if found:
            inside = sorted(pack for pack in packs if pack.args[0] in found)
            read = {source for node, spot in found.items() for source in sources(node, spot) or ()}
            nodes = {*found, *packs_of(read, packs), *inside} - {inside[-1]}
            bindings = {"region": found, "packs": inside, "indices": indices}
            yield Match(graph, inside[-1], (*sorted(nodes), inside[-1]), bindings)
        for pack in packs:
            source: Any = pack.args[0]
            computed = source.op == "call_function" and source.target is not aten.expand.default
            if computed and pack not in attended and source.meta["val"].is_floating_point():
                yield _match(graph, indices, packs, pack)


def _match(graph: Graph, indices: fx.Node, packs: list[fx.Node], pack: fx.Node) -> Match:
    """One pack and what it packs; of an attention also what its mask and the indices are made of."""
    source: Any = pack.args[0]
    nodes = {source, pack}
    condition = condition_of(indices)
    if source.target is ATTENTION.overload and condition is not None:
        mask = argument(source, "mask")
        tokens = token_mask(mask)
        if tokens is not None:
            chain = made_from(mask, tokens)
            start = chain.index(condition) + 1 if condition in chain else 0
            base = tokens if start == 0 else condition
            nodes |= {*chain[start:], *already_made(base), *packs_of(source.args[:3], packs)}
    bindings = {"source": source, "packs": packs, "indices": indices}
    return Match(graph, pack, (*sorted(nodes - {pack}), pack), bindings)


def _key(match: Match) -> tuple[str, ...]:
    return tuple(node.name for node in match.nodes)


def _refused(match: Match, node: fx.Node) -> str | None:
    """Why packed attention does not compute the same for real tokens."""
    query, key = (node.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
    if not same_size(query.shape[1], key.shape[1]):
        return f"{query.shape[1]} tokens attend to {key.shape[1]} others"
    if argument(node, "softcap") is not None:
        return "packed_attention does not cap scores"
    mask, fill = argument(node, "mask"), argument(node, "fill")
    if mask is None:
        return "it has no mask: padded positions are attended to"
    if mask.meta["val"].dtype != torch.bool:
        return f"its mask adds {mask.meta['val'].dtype} to the scores, a bias perhaps"
    if fill is not None and fill > SWALLOWS:
        return f"padded positions score {fill:.6g}, which a score may reach"
    condition = condition_of(match["indices"])
    tokens = token_mask(mask)
    if tokens is None or not masks_keys(mask, key.shape):
        return "its mask is not one of keys alone"
    if condition is None or token_mask(condition) is not tokens:
        return f"its mask is made of {tokens.name}, not of what the tokens are packed by"
    return None


def _rewrite_attention(rewriter: Rewriter, node: fx.Node, pack: fx.Node, indices: fx.Node) -> None:
    condition = condition_of(indices)
    assert condition is not None
    given: list[Any] = list(node.args[:3])
    parts = [rewriter.call(aten.squeeze.dim, shared(rewriter, PACK.overload, x, indices), 0) for x in given]
    (longest,) = sizes_of(rewriter, condition, (1,))
    options = (argument(node, "is_causal"), argument(node, "scale"))
    offsets = offsets_of(rewriter, condition)
    attended = rewriter.call(PACKED_ATTENTION.overload, *parts, offsets, longest, *options)
    rewriter.replace(pack, rewriter.call(aten.unsqueeze.default, attended, 0))


PASS = register(Pass("hoist_pack", "prune", pattern, rewrite, check))
