"""What reshapes, permutations and selections do to the dimensions of a value, and how to say it shortest.

A dimension is followed by its factors: the dimensions of the source, or parts of them, that it is made of.
``x.transpose(0, 1).reshape(S, B * H, D)`` of an x of (B, S, H * D) has S; B and H; D. Whatever the views of a
chain were, what they do together is which factors stand where, and that takes at most one reshape to tell
the factors apart, a selection for each that is left out, one permutation, and one reshape that joins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx

from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import is_symbolic, same_shape, same_size
from graphopt.ir.pattern import argument
from graphopt.passes._permutations import PERMUTATIONS, permutation, spelling

aten = torch.ops.aten

_VIEWS = (
    *(aten.reshape.default, aten.unsqueeze.default, aten.select.int, *PERMUTATIONS),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)

Size = Any  # an int, or a torch.SymInt


@dataclass(frozen=True, eq=False)
class Factor:
    """A dimension of the source, or a part of one; told from others by what it is, not by its size."""

    size: Size


Dims = list[list[Factor]]  # the outermost factor of a dimension first; none where its size is 1
Step = tuple[Any, Any]  # an op, with the dimensions, the order, or the dimension and index, that it gives


@dataclass(frozen=True)
class Layout:
    """How the elements of a value lie in another one.

    Args:
        before: the dimensions of the source.
        after: those of the value.
        taken: factors that the value has only one index of.
        reshaped: ``before`` are the dimensions that the source has once it is reshaped: they share no factors
            with those that it has by itself, as those of (2, 5, 8) and (5, 16).
    """

    before: Dims
    after: Dims
    taken: Mapping[Factor, int] = field(default_factory=dict)
    reshaped: bool = False

    @property
    def copies(self) -> bool:
        """True when the value is no view of the source: a dimension joins what lies apart there."""
        place = {factor: index for index, factor in enumerate(_flat(self.before))}
        return any(place[two] != place[one] + 1 for dim in self.after for one, two in pairwise(dim))

    @property
    def reorders(self) -> bool:
        """True when it does more than to reshape: elements change their order, or are left out."""
        return bool(self.taken) or _flat(self.before) != _flat(self.after)


class Chain(NamedTuple):
    """Views one behind the other, and what they do together."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    layout: Layout


def is_view(node: Any) -> bool:
    """True for a call that only reshapes, permutes or selects at a fixed index."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in _VIEWS:
        return False
    return node.target is not aten.select.int or isinstance(argument(node, "index"), int)


def layout_of(val: torch.Tensor) -> Layout | None:
    """A value's layout in itself; None where it is known to be empty."""
    sizes = [_known(size) for size in val.shape]
    if any(isinstance(size, int) and size == 0 for size in sizes):
        return None
    dims = [[] if _is_one(size) else [Factor(size)] for size in sizes]
    return Layout(dims, dims)


def through(layout: Layout, node: fx.Node) -> Layout | None:
    """The layout behind one more view; None where no factors say what it does."""
    order = permutation(node)
    if order is not None:
        return replace(layout, after=[layout.after[dim] for dim in order])
    if node.target is aten.select.int:
        return _selected(layout, argument(node, "dim") % len(layout.after), argument(node, "index"))
    sizes = [_known(size) for size in node.meta["val"].shape]
    found = regrouped(layout, sizes)
    if found is not None or layout.reorders:
        return found
    dims = [[] if _is_one(size) else [Factor(size)] for size in sizes]
    return Layout(dims, dims, reshaped=True)


def chains(last: fx.Node) -> list[Chain]:
    """The views that end at a node, the last first; in several chains where one layout cannot say it all.

    Nor does a chain go through a copy that others read too: it would be made once for each of them.
    """
    nodes: list[fx.Node] = []
    source: Any = last
    while is_view(source):
        nodes.append(source)
        source = source.args[0]
    found: list[Chain] = []
    members: list[fx.Node] = []
    layout = layout_of(source.meta["val"])
    for node in reversed(nodes):
        shared = len(members) > 0 and len(members[-1].users) > 1
        ahead = None if layout is None or (shared and layout.copies) else through(layout, node)
        if ahead is None:
            if members and layout is not None:
                found.append(Chain(source, tuple(members), layout))
            source, members = node.all_input_nodes[0], []
            layout = layout_of(source.meta["val"])
            ahead = layout and through(layout, node)
        members.append(node)
        layout = ahead
    if members and layout is not None:
        found.append(Chain(source, tuple(members), layout))
    return found[::-1]


def ends(
    start: fx.Node, layout: Layout, inside: Collection[fx.Node] = ()
) -> dict[fx.Node, tuple[Layout, tuple[fx.Node, ...]]]:
    """What is read of all that views make of a value: each with its layout and the views that lead there.

    Args:
        start: the value; it is one of the ends where something else than a view reads it.
        layout: its own.
        inside: readers that do not count.
    """
    found = {}
    work: list[tuple[fx.Node, Layout, tuple[fx.Node, ...]]] = [(start, layout, ())]
    while work:
        node, known, path = work.pop()
        onward = [
            (user, through(known, user) if is_view(user) else None)
            for user in node.users
            if user not in inside
        ]
        if any(ahead is None for _, ahead in onward) or (len(onward) > 1 and known.copies):
            found[node] = known, path
            continue
        work += [(user, ahead, (*path, user)) for user, ahead in onward if ahead is not None]
    return found


# The shortest spelling


def steps(layout: Layout) -> list[Step]:
    """The fewest ops that make the value of its source."""
    follows = dict(pair for dim in layout.after for pair in pairwise(dim))
    kept = [piece for dim in layout.before for piece in (_pieces(dim, follows) or [[]])]
    joined = _pieces(_flat(layout.before), follows)
    return min(_by_way_of(layout, kept), _by_way_of(layout, joined), key=len)


def count(layouts: Iterable[Layout]) -> int:
    """How many ops make values of one source, those that begin alike sharing them."""
    seen: set[tuple[str, ...]] = set()
    for layout in layouts:
        made: tuple[str, ...] = ()
        for target, given in steps(layout):
            made = (*made, f"{target} {sizes_of(given) if target is aten.reshape.default else given}")
            seen.add(made)
    return len(seen)


def _pieces(factors: Sequence[Factor], follows: Mapping[Factor, Factor]) -> Dims:
    """The factors, joined where they stand behind each other in the result, too."""
    pieces: Dims = []
    for factor in factors:
        if pieces and follows.get(pieces[-1][-1]) is factor:
            pieces[-1].append(factor)
        else:
            pieces.append([factor])
    return pieces


def _by_way_of(layout: Layout, dims: Dims) -> list[Step]:
    """The ops where the source is first reshaped to the given dimensions."""
    found: list[Step] = []
    if layout.reshaped or dims != layout.before:
        found.append((aten.reshape.default, dims))
    left = list(dims)
    for dim in reversed(range(len(dims))):
        if dims[dim] and dims[dim][0] in layout.taken:
            found.append((aten.select.int, (dim, layout.taken[dims[dim][0]])))
            del left[dim]
    order = _order(left, layout.after)
    if order != sorted(order):
        found.append((aten.permute.default, order))
    if [left[dim] for dim in order] != layout.after:
        if found and found[-1][0] is aten.reshape.default:
            found.pop()
        found.append((aten.reshape.default, layout.after))
    return found


def _order(dims: Dims, after: Dims) -> list[int]:
    """The dimensions in the order of the result, each of size 1 for the next such one there."""
    place = {factor: (dim, at) for dim, factors in enumerate(after) for at, factor in enumerate(factors)}
    ones = iter([(dim, 0) for dim, factors in enumerate(after) if not factors])
    keys = [place[dim[0]] if dim else next(ones, (len(after), 0)) for dim in dims]
    return sorted(range(len(dims)), key=keys.__getitem__)


# Building it


def known_sizes(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The dynamic sizes that views are called with."""
    return list(dict.fromkeys(size for node in nodes for size in node.all_input_nodes if is_symbolic(size)))


def unnamed(layout: Layout, sizes: Sequence[Size], known: Sequence[fx.Node]) -> str | None:
    """Why no arguments say the sizes of a spelling, or None: one at most may be left to be inferred.

    Args:
        layout: to spell.
        sizes: of the source.
        known: nodes that compute sizes.
    """
    for target, dims in steps(layout):
        if target is aten.reshape.default:
            wanted = sizes_of(dims)
            missing = [size for size in wanted if _written(size, sizes, known) is None]
            if len(missing) > 1:
                return f"of the sizes {wanted}, {missing} are not among those of its source, {list(sizes)}"
    return None


def once(rewriter: Rewriter) -> Callable[..., fx.Node]:
    """``rewriter.call``, the same call made once."""
    made: dict[Any, fx.Node] = {}

    def call(target: Any, *args: Any) -> fx.Node:
        key = target, tuple(tuple(arg) if isinstance(arg, list) else arg for arg in args)
        if key not in made:
            made[key] = rewriter.call(target, *args)
        return made[key]

    return call


def spelled(
    call: Callable[..., fx.Node], source: fx.Node, layout: Layout, known: Sequence[fx.Node]
) -> fx.Node:
    """The value, made of its source in the fewest ops.

    Args:
        call: as of ``once``.
        source: what it is made of.
        layout: how; ``unnamed`` has nothing against it.
        known: nodes that compute sizes.
    """
    node, dims = source, source.meta["val"].shape

    def written(size: Size) -> Any:
        found = _written(size, dims, known)
        if isinstance(found, _Dim):
            return call(aten.sym_size.int, source, found.dim)
        return -1 if found is None else found

    for target, given in steps(layout):
        if target is aten.select.int:
            node = call(target, node, *given)
        elif target is aten.permute.default:
            op, args = spelling(given)
            node = call(op, node, *args)
        elif not same_shape(sizes := sizes_of(given), node.meta["val"].shape):
            node = call(target, node, [written(size) for size in sizes])
    return node


@dataclass(frozen=True)
class _Dim:
    """A size that is that of a dimension."""

    dim: int


def _written(size: Size, sizes: Sequence[Size], known: Sequence[fx.Node]) -> Any:
    """A size as a number, a node, or a dimension of that size; None where it is none of these."""
    if isinstance(size, int):
        return size
    for node in known:
        if same_size(node.meta["val"], size):
            return node
    return next((_Dim(dim) for dim, other in enumerate(sizes) if same_size(other, size)), None)


# Sizes and factors


def _flat(dims: Dims) -> list[Factor]:
    return [factor for dim in dims for factor in dim]


def sizes_of(dims: Dims) -> list[Size]:
    """The sizes of dimensions: the products of their factors."""
    return [_known(math.prod(factor.size for factor in dim)) for dim in dims]


def _known(size: Size) -> Size:
    """A size that is one number, as that number."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def _quotient(size: Size, by: Size) -> Size | None:
    """One size by another where it is a multiple of that whatever the inputs, else None."""
    if isinstance(size, int) and isinstance(by, int):
        return None if size % by else size // by
    found = _known(size // by)
    return found if same_size(found * by, size) else None


def _selected(layout: Layout, dim: int, index: int) -> Layout | None:
    """One index of a dimension: one of each of its factors."""
    factors = layout.after[dim]
    taken: dict[Factor, int] = {}
    if len(factors) == 1:
        taken[factors[0]] = index
    elif factors:
        if not all(isinstance(factor.size, int) for factor in factors):
            return None
        rest = index % math.prod(factor.size for factor in factors)
        for factor in reversed(factors):
            rest, taken[factor] = divmod(rest, factor.size)
    after = [*layout.after[:dim], *layout.after[dim + 1 :]]
    return replace(layout, after=after, taken={**layout.taken, **taken})


def regrouped(layout: Layout, sizes: Sequence[Size]) -> Layout | None:
    """The same factors in dimensions of other sizes, some taken apart; None where that is impossible."""
    rest = _flat(layout.after)[::-1]
    parts: dict[Factor, list[Factor]] = {}
    after: Dims = []
    for size in sizes:
        dim: list[Factor] = []
        left = size
        while not _is_one(left):
            if not rest:
                return None
            factor = rest.pop()
            fewer = _quotient(left, factor.size)
            if fewer is None:
                inner = _quotient(factor.size, left)
                if inner is None:
                    return None
                parts[factor] = [Factor(left), Factor(inner)]
                rest.append(parts[factor][1])
                factor, fewer = parts[factor][0], 1
            dim.append(factor)
            left = fewer
        after.append(dim)
    if rest:
        return None
    before = [[part for factor in dim for part in _apart(factor, parts)] for dim in layout.before]
    return replace(layout, before=before, after=after)


def _apart(factor: Factor, parts: Mapping[Factor, list[Factor]]) -> list[Factor]:
    if factor not in parts:
        return [factor]
    return [piece for part in parts[factor] for piece in _apart(part, parts)]
