"""Features turned in pairs: first * cos - second * sin, second * cos + first * sin -> rope(x, cos, sin)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph, same_shape, same_size, users_outside
from graphopt.ir.pattern import Match, argument
from graphopt.kernels.rope import OP as ROPE
from graphopt.passes._angles import columns, take
from graphopt.passes._features import Features, Followed, Part, Table, feature_source
from graphopt.passes._moments import widens

aten = torch.ops.aten

_JOINS = (
    aten.cat.default,
    aten.stack.default,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten.to.dtype,
    aten.type_as.default,
)
_STEPS = 6  # from the sum of two products to the whole: a join of halves, a cast, a join with the rest


@dataclass(frozen=True)
class Rotation:
    """What a rotation does to D features of x, from ``offset`` on.

    Args:
        straight: the table that stays with a feature, and its part.
        crossed: the table that meets the other feature of a pair, and its part.
        offset: the first feature.
        turning: how many features turn; the others pass.
    """

    straight: Table
    crossed: Table
    offset: int
    turning: int
    cos: Part
    sin: Part


def pattern(graph: Graph) -> Iterator[Match]:
    """Every sum of two products, and every product of complex numbers, grown as far as it is a rotation."""
    seen: set[fx.Node] = set()
    for seed in _seeds(graph):
        match = None if seed._erased else _grown(graph, seed)
        if match is not None and match.root not in seen:
            seen.add(match.root)
            yield match


def _seeds(graph: Graph) -> list[fx.Node]:
    found = []
    for op in (aten.add.Tensor, aten.sub.Tensor, aten.view_as_real.default):
        for node in graph.fx.find_nodes(op="call_function", target=op):
            summands = node.args[:2] if op is not aten.view_as_real.default else ()
            if all(isinstance(n, fx.Node) and n.target is aten.mul.Tensor for n in summands):
                found.append(node)
    return sorted(found)


def _grown(graph: Graph, seed: fx.Node) -> Match | None:
    """The match with the last value that is still a rotation, or else a near miss."""
    roots = [seed]
    while len(roots) <= _STEPS and len(roots[-1].users) == 1:
        (user,) = roots[-1].users
        if user.target not in _JOINS:
            break
        roots.append(user)
    missed = None
    for root in reversed(roots):
        for x in _tensors(seed):
            found = _rotation(graph, root, x)
            if found is not None and found.get("rotation"):
                return found
            missed = missed or found
    return missed


def _tensors(seed: fx.Node) -> list[fx.Node]:
    """What may be turned: the values that both summands take features from, the nearest first."""
    products: Any = seed.args[:2] if seed.target is not aten.view_as_real.default else [seed.args[0]]
    chains = [[link for factor in product.all_input_nodes for link in _chain(factor)] for product in products]
    common = [node for node in chains[0] if all(node in chain for chain in chains)]
    return [node for node in dict.fromkeys(common) if _has_features(node) and not widens(node)]


def _chain(node: fx.Node | None) -> Iterator[fx.Node]:
    while node is not None:
        yield node
        node = feature_source(node)


def _has_features(node: fx.Node) -> bool:
    val = node.meta.get("val")
    floating = isinstance(val, torch.Tensor) and val.is_floating_point() and 2 <= val.dim() <= 4
    return floating and node.op != "get_attr" and isinstance(val.shape[-1], int)  # type: ignore[union-attr]


def _rotation(graph: Graph, root: fx.Node, x: fx.Node) -> Match | None:
    follow = Followed(graph, x)
    features = follow(root)
    if not isinstance(features, Features) or len(features.layout) != 1:
        return None
    shape = root.meta["val"].shape
    if not same_shape(shape[:-1], x.meta["val"].shape[:-1]):
        return None
    found = _paired(features)
    if found is None:
        return None
    nodes = _between(follow, root)
    bound: dict[str, Any] = {"x": x, "reason": found if isinstance(found, str) else _shared(follow, nodes)}
    if isinstance(found, Rotation):
        bound |= {"rotation": found, "cos": found.straight[0], "sin": found.crossed[0]}
        bound["order"] = _order(graph, found)
        bound["x"] = _narrow(follow, root, x, found.offset, shape[-1])
    return Match(graph, root, tuple(n for n in nodes if n is not bound["x"]), bound)


def _paired(features: Features) -> Rotation | str | None:
    """The two tables and what they multiply; a reason where features are exchanged, but not in pairs."""
    parts = {key: part for key, part in features.parts.items() if bool(part.sign.any())}
    tables = [key for key in parts if key is not None]
    if len(tables) != 2:
        return None
    one, two = (parts[key] for key in tables)
    turning = int(one.sign.abs().sum())
    places = torch.arange(len(one.sign))
    if not _stays(one, turning):
        tables, one, two = tables[::-1], two, one
    if not _stays(one, turning):
        return None
    (straight, crossed), cos, sin, offset = tables, one, two, int(one.index[0])
    exchanged = bool((sin.index[:turning] != cos.index[:turning]).all())
    if not exchanged or not bool((sin.sign[:turning].abs() == 1).all()) or bool(sin.sign[turning:].any()):
        return None
    if turning < len(places):
        rest = parts.get(None)
        if rest is None or not bool((rest.index[turning:] == places[turning:] + offset).all()):
            return None
        if not bool((rest.sign[turning:] == 1).all()) or bool(rest.sign[:turning].any()):
            return None
    elif None in parts:
        return None
    partner = sin.index[:turning] - offset
    if not bool((partner[partner.clamp(0, turning - 1)] == places[:turning]).all()):
        return f"the rotated parts are not the halves of {turning} features"
    return Rotation(straight, crossed, offset, turning, cos, sin)


def _stays(part: Part, turning: int) -> bool:
    """Whether a table multiplies the first features that come out, each at its place."""
    places = torch.arange(turning) + part.index[0]
    kept = bool((part.sign[:turning] == 1).all()) and not bool(part.sign[turning:].any())
    return kept and torch.equal(part.index[:turning], places)


def _order(graph: Graph, found: Rotation) -> tuple[bool, bool] | str:
    """(interleaved, turned backwards), or why the rotation is none that the op knows."""
    turning, half = found.turning, found.turning // 2
    partner = found.sin.index[:turning] - found.offset
    places = torch.arange(turning)
    interleaved = bool((partner == (places ^ 1)).all())
    if not interleaved and not bool((partner == (places + half) % turning).all()):
        return "the features are paired neither with their neighbours nor by halves"
    first = places[0::2] if interleaved else places[:half]
    second = places[1::2] if interleaved else places[half:]
    signs = found.sin.sign[first], found.sin.sign[second]
    if not (bool((signs[0] == -signs[1]).all()) and bool((signs[0] == signs[0][0]).all())):
        return "the two features of a pair do not turn together"
    for name, (table, part), side in (("cos", found.straight, found.cos), ("sin", found.crossed, found.sin)):
        known = columns(graph, table, part)
        if not bool((known[side.at[first]] == known[side.at[second]]).all()):
            return f"the {name} table is not known to hold each angle twice"
        at = side.at[first]
        step = int(at[1] - at[0]) if half > 1 else 1
        if step < 1 or not bool((at == at[0] + step * torch.arange(half)).all()):
            return f"the {name} table is not read in order"
    return interleaved, bool(signs[0][0] > 0)


def _between(follow: Followed, root: fx.Node) -> list[fx.Node]:
    """The calls that take the features from x to the root, the root last; tables may depend on x's size."""
    found, work = {root}, [root]
    while work:
        for source in work.pop().all_input_nodes:
            if source not in found and source is not follow.x and follow(source) is not None:
                found.add(source)
                work.append(source)
    return sorted(found)


def _shared(follow: Followed, nodes: list[fx.Node]) -> str | None:
    """A step that something else reads; views and casts of x may be read."""
    for node in nodes[:-1]:
        features = follow(node)
        pieces = features if isinstance(features, tuple) else (features,)
        if all(isinstance(piece, Features) and piece.is_moved_only for piece in pieces):
            continue
        for user in users_outside(node, nodes):
            return f"{node.name} is also read by {user.name}"
    return None


def _narrow(follow: Followed, root: fx.Node, x: fx.Node, offset: int, width: int) -> fx.Node:
    """The node that holds just the features that come out, when there is one."""
    wanted = torch.arange(offset, offset + width)
    for node in _between(follow, root):
        features = follow(node)
        if not isinstance(features, Features) or not features.is_moved_only or widens(node):
            continue
        if torch.equal(features.parts[None].index, wanted):
            return node
    return x


_PLACES = {4: ((0, 2, 1), (0, 1, 2)), 3: ((0, 1, None), (None, 0, 1)), 2: ((None, 0, None),)}


def _places(match: Match) -> tuple[int | None, int, int | None] | str:
    """Which dimensions of x are batch, tokens and heads: the tables tell, being the same for all heads."""
    shape = match.val("x").shape[:-1]
    for batch, tokens, heads in _PLACES[len(shape) + 1]:
        if all(_fits(_leading(match, name), shape, batch, tokens, heads) for name in ("cos", "sin")):
            return batch, tokens, heads
    table = list(match.val("cos").shape)
    return f"the cos table has shape {table}, which does not fit {list(match.val('x').shape)}"


def _leading(match: Match, name: str) -> list[Any]:
    """A table's leading dimensions, as many as x has."""
    shape = match.val(name).shape[:-1]
    return [1] * (match.val("x").dim() - 1 - len(shape)) + list(shape)


def _fits(table: list[Any], x: Any, batch: int | None, tokens: int | None, heads: int | None) -> bool:
    if heads is not None and not same_size(table[heads], 1):
        return False
    if batch is not None and not same_size(table[batch], 1) and not same_size(table[batch], x[batch]):
        return False
    return tokens is not None and same_size(table[tokens], x[tokens])


def check(match: Match) -> str | None:
    """Pairs that the op knows, angles that belong to a pair, tables that fit x in shape and type."""
    if match["reason"]:
        reason: str = match["reason"]
        return reason
    if isinstance(match["order"], str):
        return match["order"]
    places = _places(match)
    if isinstance(places, str):
        return places
    batches = [places[0] is None or _leading(match, name)[places[0]] for name in ("cos", "sin")]
    if not same_size(*batches):
        return "the two tables differ in shape"
    dtype = _dtype(match)
    for name in ("cos", "sin"):
        if _real(match.val(name).dtype) not in (dtype, torch.float32, torch.bfloat16, torch.float16):
            return f"the {name} table is {match.val(name).dtype}, not {dtype}"
    return None


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.complex64 else dtype


def _dtype(match: Match) -> torch.dtype:
    """The type that x is turned in: that of the result, where it holds x."""
    x = match["x"]
    source = x.args[0] if x.op == "call_function" and widens(x) else x
    return torch.promote_types(source.meta["val"].dtype, match.root.meta["val"].dtype)


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Half tables, tokens first; the transposes cancel against those already there."""
    places: Any = _places(match)
    interleaved, backwards = match["order"]
    x, dtype = _input(rewriter, match), _dtype(match)
    if places == (0, 2, 1):
        x = rewriter.call(aten.transpose.int, x, 1, 2)
    added = {(0, 1, None): (2,), (None, 0, 1): (0,), (None, 0, None): (0, 2)}.get(places, ())
    for dim in added:
        x = rewriter.call(aten.unsqueeze.default, x, dim)
    cos, sin = (_table(rewriter, match, name, places, dtype) for name in ("cos", "sin"))
    sin = rewriter.call(aten.neg.default, sin) if backwards else sin
    out = rewriter.call(ROPE.overload, x, cos, sin, *([True] if interleaved else []))
    for dim in reversed(added):
        out = rewriter.call(aten.squeeze.dim, out, dim)
    if places == (0, 2, 1):
        out = rewriter.call(aten.transpose.int, out, 1, 2)
    if dtype != match.root.meta["val"].dtype:
        out = rewriter.call(aten.to.dtype, out, match.root.meta["val"].dtype)
    rewriter.replace(match.root, out)


def _input(rewriter: Rewriter, match: Match) -> fx.Node:
    """x with just the features that come out, in the type that it is turned in."""
    x: fx.Node = match["x"]
    dtype, width = _dtype(match), match.root.meta["val"].shape[-1]
    if x.meta["val"].dtype != dtype and x.op == "call_function" and widens(x):
        x = x.args[0]  # type: ignore[assignment]
    offset = match["rotation"].offset
    if x.meta["val"].shape[-1] != width:
        x = rewriter.call(aten.slice.Tensor, x, x.meta["val"].dim() - 1, offset, offset + width)
    return x if x.meta["val"].dtype == dtype else rewriter.call(aten.to.dtype, x, dtype)


def _table(rewriter: Rewriter, match: Match, name: str, places: Any, dtype: torch.dtype) -> fx.Node:
    """(batch, tokens, pairs) out of a table that lines up with x, each angle once."""
    rotation, interleaved = match["rotation"], match["order"][0]
    (node, part), side = (
        (rotation.straight, rotation.cos) if name == "cos" else (rotation.crossed, rotation.sin)
    )
    at = side.at[: rotation.turning : 2] if interleaved else side.at[: rotation.turning // 2]
    step = int(at[1] - at[0]) if len(at) > 1 else 1
    of_columns = (int(at[0]), step, len(at), part)
    heads = _heads(match, node, places)
    node = take(rewriter, node, *of_columns)
    if heads is not None and node.target is aten.unsqueeze.default and argument(node, "dim") == heads:
        node = node.args[0]
    elif heads is not None:
        node = rewriter.call(aten.squeeze.dim, node, heads)
    while node.meta["val"].dim() < 3:
        node = rewriter.call(aten.unsqueeze.default, node, 0)
    wide = torch.promote_types(dtype, node.meta["val"].dtype)
    return node if node.meta["val"].dtype == wide else rewriter.call(aten.to.dtype, node, wide)


def _heads(match: Match, table: fx.Node, places: Any) -> int | None:
    """Which dimension of a table stands for x's heads, or None."""
    if places[2] is None:
        return None
    dim: int = places[2] - match.val("x").dim() + table.meta["val"].dim()
    return dim if dim >= 0 else None


PASS = register(Pass("fuse_rope", "fuse", pattern, rewrite, check))
