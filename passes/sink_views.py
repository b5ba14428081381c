"""f(permute(x)) -> permute(f(x)), where f works on each row by itself, and permutes meet others behind it.

f is made of projections, norms over the features, activations, sums of values of the same rows.
``torch.nn.MultiheadAttention`` transposes batch and length in front of its projections, and back behind them:
rows are then projected where they lie, queries, keys and values are strided views of one product, and what
attention returns is read as it lies. An encoder that keeps its positions in front computes as one that does
not. Only where views become fewer, and no more of them copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from graphopt.compiler.pass_ import Pass, register
from graphopt.compiler.rewriter import Rewriter
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match
from graphopt.passes._rows import operands, recomputed, sizes
from graphopt.passes._views import (
    Dims,
    Factor,
    Layout,
    chains,
    count,
    ends,
    is_view,
    known_sizes,
    layout_of,
    once,
    regrouped,
    sizes_of,
    spelled,
    through,
    unnamed,
)

Path = tuple[fx.Node, ...]
_Front = tuple[fx.Node, Path, Layout]  # a value, the views of it, and what they do


@dataclass(frozen=True)
class _Given:
    """Rows that a region reads.

    Args:
        source: what the views in front of it start from.
        views: those views.
        old: how the rows lie in the source.
        new: how those lie there that the region will read.
    """

    source: fx.Node
    views: Path
    old: Layout
    new: Layout


@dataclass(frozen=True)
class _Read:
    """A value that is read of a region.

    Args:
        node: the row-wise call that views make it of.
        views: those views.
        old: how it lies in that.
        new: how it will lie.
    """

    node: fx.Node
    views: Path
    old: Layout
    new: Layout


@dataclass(frozen=True)
class _Site:
    """A region of row-wise calls between views.

    Args:
        inner: the calls.
        given: by the node that the region reads.
        read: by the node that is read.
        rows: the dimensions in front of the features, as they will be.
    """

    inner: list[fx.Node]
    given: dict[fx.Node, _Given]
    read: dict[fx.Node, _Read]
    rows: Dims

    @property
    def in_front(self) -> set[fx.Node]:
        """The views in front that nothing else reads: they go."""
        gone = set(self.inner)
        for view in sorted({view for rows in self.given.values() for view in rows.views}, reverse=True):
            if gone.issuperset(view.users):
                gone.add(view)
        return gone.difference(self.inner)

    @property
    def behind(self) -> set[fx.Node]:
        """The views behind it."""
        return {view for value in self.read.values() for view in value.views}

    @property
    def nodes(self) -> Path:
        """All of it, in order."""
        views = {view for rows in self.given.values() for view in rows.views}
        return tuple(sorted({*self.inner, *views, *self.behind}))

    def costs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many views there are, and how many of them copy: now, and then."""
        given, read = self.given.values(), self.read.values()
        copies = sum(_copies_rows(rows.old) for rows in given) + sum(value.old.copies for value in read)
        sources, calls = {rows.source for rows in given}, {value.node for value in read}
        views = sum(count(rows.new for rows in given if rows.source is source) for source in sources)
        views += sum(count(value.new for value in read if value.node is node) for node in calls)
        then = sum(_copies_rows(rows.new) for rows in given) + sum(value.new.copies for value in read)
        return (len(self.in_front) + len(self.behind), copies), (views, then)


def pattern(graph: Graph) -> Iterator[Match]:
    """Every region that reads rows which views have put in another order or shape, small ones first."""
    seen: set[fx.Node] = set()
    regions = []
    for node in graph.calls:
        if node not in seen and any(map(is_view, operands(node) or [])):
            regions.append(_region(node))
            seen.update(regions[-1])
    for region in sorted(regions, key=len):
        if not any(node._erased for node in region):
            found = _site(_region(region[0]))
            if found is not None:
                yield Match(graph, found.nodes[-1], found.nodes, {"site": found})


def check(match: Match) -> str | None:
    """There must be fewer views, no more of them may copy, and their sizes must be known."""
    site: _Site = match["site"]
    now, then = site.costs()
    if then[0] >= now[0] or then[1] > now[1]:
        return f"{now[0]} views, of which {now[1]} copy, would be {then[0]}, of which {then[1]} copy"
    known = known_sizes(match.nodes)
    for rows in site.given.values():
        reason = unnamed(rows.new, rows.source.meta["val"].shape, known)
        if reason is not None:
            return reason
    for value in site.read.values():
        reason = unnamed(value.new, [*sizes_of(site.rows), sizes(value.node)[-1]], known)
        if reason is not None:
            return reason
    return None


def rewrite(rewriter: Rewriter, match: Match) -> None:
    """Compute the rows where they lie; the views in front and those behind become one chain."""
    site: _Site = match["site"]
    known, call = known_sizes(match.nodes), once(rewriter)
    new = {node: spelled(call, rows.source, rows.new, known) for node, rows in site.given.items()}
    for node in site.inner:
        new[node] = recomputed(rewriter, node, new)
    for node, value in site.read.items():
        rewriter.replace(node, spelled(call, new[value.node], value.new, known))


def _region(seed: fx.Node) -> list[fx.Node]:
    """The row-wise calls that are computed together with one, in order."""
    found: set[fx.Node] = set()
    work = [seed]
    while work:
        node = work.pop()
        rows = operands(node)
        if rows is not None and node not in found:
            found.add(node)
            work += rows
            work += [user for user in node.users if node in (operands(user) or [])]
    return sorted(found)


def _site(inner: list[fx.Node]) -> _Site | None:
    """The cheapest way to compute a region's rows where some of them lie; None if all lie as they are."""
    inside = set(inner)
    given = dict.fromkeys(source for node in inner for source in operands(node) or [] if source not in inside)
    fronts: dict[fx.Node, _Front] = {}
    for node in given:
        front = _front(node)
        if front is None or front[0] in inside:
            return None
        fronts[node] = front
    sites = [_in_order(inner, fronts, *order) for order in _orders(fronts.values())]
    return min((site for site in sites if site is not None), key=lambda site: site.costs()[1], default=None)


def _orders(fronts: Iterable[_Front]) -> list[tuple[Dims, Dims]]:
    """The dimensions of rows that views have put in another order, each order once: as they are and lie."""
    found: dict[str, tuple[Dims, Dims]] = {}
    for _, _, layout in fronts:
        old, new = layout.after[:-1], _as_they_lie(layout).after[:-1]
        if old != new:
            place = {factor: index for index, factor in enumerate(factor for dim in old for factor in dim)}
            dims = [[[place[factor] for factor in dim] for dim in side] for side in (old, new)]
            found.setdefault(f"{dims} of {[factor.size for factor in place]}", (old, new))
    return list(found.values())


def _in_order(inner: list[fx.Node], fronts: Mapping[fx.Node, _Front], old: Dims, new: Dims) -> _Site | None:
    """What it is to compute a region's rows in an order; None where some cannot be had in it."""
    site = _Site(inner, {}, {}, new)
    for node, (source, views, layout) in fronts.items():
        rows = _rearranged(layout, old, new)
        if rows is None:
            return None
        site.given[node] = _Given(source, views, layout, rows)
    inside = set(inner)
    fits = (_add_read(site, node, inside, old) for node in inner if not inside.issuperset(node.users))
    return site if all(fits) else None


def _add_read(site: _Site, node: fx.Node, inside: set[fx.Node], old: Dims) -> bool:
    """Note what is read of a call, and say whether that can be said of its new rows."""
    before = layout_of(node.meta["val"]) if isinstance(node.meta["val"], torch.Tensor) else None
    if before is None:
        return False
    size = node.meta["val"].shape[-1]
    features = [] if isinstance(size, int) and size == 1 else [Factor(size)]
    for end, (layout, views) in ends(node, Layout([*site.rows, features], [*old, features]), inside).items():
        now = before
        for view in views:
            ahead = through(now, view)
            if ahead is None:
                return False
            now = ahead
        site.read[end] = _Read(node, views, now, layout)
    return True


def _front(node: fx.Node) -> _Front | None:
    """What the views start from that end at a node, those views, and what they do."""
    chain = next(iter(chains(node)), None)
    if chain is not None:
        return chain
    layout = layout_of(node.meta["val"])
    return None if layout is None else (node, (), layout)


def _as_they_lie(layout: Layout) -> Layout:
    """The same rows in the order of the source: its dimensions but for what the features are made of."""
    features = layout.after[-1]
    gone = {*features, *layout.taken}
    rows = [[factor for factor in dim if factor not in gone] for dim in layout.before]
    kept = [row for row, dim in zip(rows, layout.before, strict=True) if row or not dim]
    return replace(layout, after=[*kept, features])


def _rearranged(layout: Layout, old: Dims, new: Dims) -> Layout | None:
    """Other rows of the same dimensions, arranged as these are; None where they do not fall apart so."""
    factors = [factor for dim in old for factor in dim]
    found = regrouped(layout, [*(factor.size for factor in factors), *sizes_of(layout.after[-1:])])
    if found is None:
        return None
    own = dict(zip(factors, found.after, strict=False))
    rows = [[part for factor in dim for part in own[factor]] for dim in new]
    return replace(found, after=[*rows, found.after[-1]])


def _copies_rows(layout: Layout) -> bool:
    """True when a projection of these rows copies them: they do not lie one behind the other."""
    *rows, features = layout.after
    return replace(layout, after=[[factor for dim in rows for factor in dim], features]).copies


PASS = register(Pass("sink_views", "prune", pattern, rewrite, check))
