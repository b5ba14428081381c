"""Where the nodes of a graph are drawn: a layered layout, from top to bottom, in linear time.

The steps are those of Sugiyama, Tagawa and Toda (1981): layers by longest path, sources pulled down to their
readers; long edges cut into one bend a layer, shared by all the readers of a value; order within a layer by
the median of the neighbours; x by least squares, the order kept. The graph of a real model is a long chain
with few values alive at a time, so a few sweeps are enough and nothing is ever compared pairwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import networkx as nx

HEIGHT = 38.0  # of a node, in pixels
_GAP_X, _GAP_Y, _MARGIN = 18.0, 30.0, 24.0
_BEND_WIDTH = 10.0
_MAX_SPAN = 80  # layers: a longer way between two readers is drawn without bends, which bounds their number
_ORDER_SWEEPS, _PLACE_SWEEPS = 4, 8
# How hard cells pull at each other: two nodes; a node and a bend, softly, so that blocks stay on their trunk;
# two bends, which should stand in line. Cells with several neighbours are also pulled to x = 0: without it
# every block of a model stands a little further to the right than the one before.
_PULLS = (1.0, 0.25, 8.0)
_TO_AXIS = 0.4

Point = tuple[float, float]


@dataclass(frozen=True)
class Edge:
    """A drawn edge.

    Args:
        source: name of the node that makes the value.
        target: name of a node that reads it.
        points: from the source's lower border to the target's upper one, layer by layer.
    """

    source: str
    target: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Layout:
    """A graph with places, in pixels.

    Args:
        width: of the drawing.
        height: of the drawing.
        places: the centre of every node's upper border, by name.
        edges: every edge once.
    """

    width: float
    height: float
    places: Mapping[str, Point]
    edges: Sequence[Edge]


def layered(reads: Mapping[str, Sequence[str]], widths: Mapping[str, float]) -> Layout:
    """Lay out a directed acyclic graph.

    Args:
        reads: for every node, the nodes that it reads; names that are no nodes are left out.
        widths: of every node, in pixels.

    Returns:
        Places in which no two nodes overlap and every edge runs downwards.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(reads)
    graph.add_edges_from((s, target) for target, sources in reads.items() for s in sources if s in reads)
    if not graph:
        return Layout(2 * _MARGIN, 2 * _MARGIN, {}, ())
    rows = _Rows(graph, widths)
    rows.order()
    rows.place()
    return rows.layout()


@dataclass(eq=False)
class _Cell:
    """A node, or the bend of a long edge, in its layer."""

    width: float
    layer: int
    node: str | None = None
    x: float = 0.0
    rank: int = 0
    above: list[_Cell] = field(default_factory=list)
    below: list[_Cell] = field(default_factory=list)


class _Rows:
    """The layers of one drawing."""

    def __init__(self, graph: nx.DiGraph, widths: Mapping[str, float]) -> None:
        layers = _layers(graph)
        self.cells = {name: _Cell(widths[name], layers[name], name) for name in graph}
        self.rows: list[list[_Cell]] = [[] for _ in range(max(layers.values()) + 1)]
        for cell in self.cells.values():
            self.rows[cell.layer].append(cell)
        self.ways: list[tuple[str, str, list[_Cell]]] = []
        for source in graph:
            self._lay_edges(source, sorted(graph.successors(source), key=layers.__getitem__))
        for row in self.rows:
            _number(row)

    def _lay_edges(self, source: str, readers: Sequence[str]) -> None:
        """One chain of bends serves all the readers of a value: they leave it where they are."""
        start = self.cells[source]
        chain = [start]
        for reader in readers:
            end = self.cells[reader]
            if end.layer - chain[-1].layer <= _MAX_SPAN:
                while chain[-1].layer < end.layer - 1:
                    bend = _Cell(_BEND_WIDTH, chain[-1].layer + 1)
                    self.rows[bend.layer].append(bend)
                    _join(chain[-1], bend)
                    chain.append(bend)
            way = chain[: end.layer - start.layer]
            if way[-1].layer == end.layer - 1:
                _join(way[-1], end)
            self.ways.append((source, reader, way[1:]))

    def order(self) -> None:
        """Sort the layers, down and up in turn, by the median rank of the neighbours."""
        for sweep in range(_ORDER_SWEEPS):
            down = sweep % 2 == 0
            for row in self.rows if down else reversed(self.rows):
                row.sort(key=lambda cell, down=down: _median(cell, down))  # type: ignore[misc]
                _number(row)

    def place(self) -> None:
        """Give every cell the x that its neighbours ask for, as far as the order allows."""
        for row in self.rows:
            _settle(row, [0.0] * len(row), [1.0] * len(row))
        for sweep in range(_PLACE_SWEEPS):
            down = sweep % 2 == 0
            for row in self.rows if down else reversed(self.rows):
                wishes = [_wish(cell, cell.above if down else cell.below) for cell in row]
                _settle(row, [x for x, _ in wishes], [weight for _, weight in wishes])

    def layout(self) -> Layout:
        """Shift everything into the picture."""
        cells = [cell for row in self.rows for cell in row]
        shift = _MARGIN - min(cell.x - cell.width / 2 for cell in cells)
        right = max(cell.x + cell.width / 2 for cell in cells) + shift
        top = {cell: (cell.x + shift, _MARGIN + cell.layer * (HEIGHT + _GAP_Y)) for cell in cells}
        edges = []
        for source, target, bends in self.ways:
            first, last = top[self.cells[source]], top[self.cells[target]]
            between = [point for b in bends for point in (top[b], (top[b][0], top[b][1] + HEIGHT))]
            edges.append(Edge(source, target, ((first[0], first[1] + HEIGHT), *between, last)))
        height = 2 * _MARGIN + len(self.rows) * (HEIGHT + _GAP_Y) - _GAP_Y
        return Layout(right + _MARGIN, height, {n: top[c] for n, c in self.cells.items()}, edges)


def _layers(graph: nx.DiGraph) -> dict[str, int]:
    """Longest path from the sources; a node with fewer inputs than readers then moves down to its readers."""
    generations = list(nx.topological_generations(graph))
    layers = {name: layer for layer, names in enumerate(generations) for name in names}
    for names in reversed(generations):
        for name in names:
            readers = list(graph.successors(name))
            if graph.in_degree(name) < len(readers):
                layers[name] = min(layers[reader] for reader in readers) - 1
    return layers


def _join(upper: _Cell, lower: _Cell) -> None:
    upper.below.append(lower)
    lower.above.append(upper)


def _number(row: list[_Cell]) -> None:
    for rank, cell in enumerate(row):
        cell.rank = rank


def _median(cell: _Cell, down: bool) -> float:
    ranks = [other.rank for other in (cell.above if down else cell.below)]
    return median_low(ranks) if ranks else cell.rank


def _wish(cell: _Cell, neighbours: Sequence[_Cell]) -> tuple[float, float]:
    """Where a cell wants to be, and how much."""
    if not neighbours:
        return cell.x, 0.1
    pulls = [_PULLS[(cell.node is None) + (other.node is None)] for other in neighbours]
    total = sum(pulls) + (_TO_AXIS if len(pulls) > 1 else 0.0)
    return sum(pull * other.x for pull, other in zip(pulls, neighbours, strict=True)) / total, total


def _settle(row: Sequence[_Cell], wishes: Sequence[float], weights: Sequence[float]) -> None:
    """The x nearest to the wishes, in weighted least squares, that keep the order and the gaps.

    Without the widths it is isotonic regression, which pooling adjacent violators solves exactly in linear
    time (Barlow, Bartholomew, Bremner and Brunk, 1972).
    """
    offsets, offset = [], 0.0
    for index, cell in enumerate(row):
        if index:
            offset += (row[index - 1].width + cell.width) / 2 + _GAP_X
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many cells
    for wish, weight, shift in zip(wishes, weights, offsets, strict=True):
        mean, count = wish - shift, 1
        while pools and pools[-1][0] > mean:
            other, heavy, many = pools.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, count = weight + heavy, count + many
        pools.append((mean, weight, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    for cell, mean, shift in zip(row, means, offsets, strict=True):
        cell.x = mean + shift
