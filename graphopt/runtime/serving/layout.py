"""How requests are joined into a batch and its results split again, as the captured graph's sizes say.

A dimension is the batch where its symbol stands once in every input and every output. Lengths are the other
dynamic sizes of the inputs; a request may be padded along them where each is a size of its own, not computed
from others. That rows do not depend on each other, and results not on padding, no size says: the batcher
checks it on the first batches.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphopt.errors import InputError
from graphopt.ir.graph import Graph, size_bounds

Lengths = tuple[int, ...]
Size = int | str | frozenset[str]  # a number, a symbol, or the symbols that it is computed from


@dataclass(frozen=True)
class InputSizes:
    """The sizes of one tensor input.

    Args:
        path: as the user writes it: ``input_ids``.
        sizes: of its dimensions.
        names: the user's names of symbols.
    """

    path: str
    sizes: tuple[Size, ...]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Sizes:
    """The sizes at a graph's border, without the graph.

    Args:
        inputs: of every tensor input, in order.
        outputs: of every flat output: None for one that is the same in every call.
        most: the largest value of a symbol, where it has one.
    """

    inputs: tuple[InputSizes, ...]
    outputs: tuple[tuple[Size, ...] | None, ...]
    most: Mapping[str, int]

    @staticmethod
    def of(graph: Graph) -> Sizes:
        """The sizes of a captured graph."""
        specs = [spec for spec in graph.inputs if spec.node is not None]
        inputs: list[InputSizes] = []
        most: dict[str, int] = {}
        for spec in specs:
            sizes = tuple(_size(size) for size in spec.shape)
            named = {str(sizes[dim]): label for dim, label in spec.dims.items()}
            inputs.append(InputSizes(spec.path, sizes, named))
            for size, symbol in zip(spec.shape, sizes, strict=True):
                if isinstance(symbol, str):
                    _, bound = size_bounds(size)
                    most |= {} if bound is None else {symbol: bound}
        results: Any = graph.output.args[0]
        return Sizes(tuple(inputs), tuple(_output_sizes(result) for result in results), most)


def _size(size: Any) -> Size:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_Symbol:
        return str(expression)
    return frozenset(map(str, expression.free_symbols))


def _output_sizes(result: Any) -> tuple[Size, ...] | None:
    if not isinstance(result, fx.Node) or result.op == "get_attr":
        return None
    value = result.meta["val"]
    if not isinstance(value, torch.Tensor):
        return ()  # a size: of the whole batch, not of a request
    return tuple(_size(size) for size in value.shape)


@dataclass(frozen=True)
class Layout:
    """Where the rows and the lengths of inputs and outputs are.

    Args:
        rows: the batch dimension of every input.
        lengths: by input, the dimensions that are lengths, with their place in a request's ``Lengths``.
        results: by output, its batch dimension and lengths likewise; None for one that all calls share.
        names: of the lengths, for people.
        edges: by length, the sizes that a request may be padded to, ascending; None where it may not be.
        fills: by input, what padding is made of.
        max_rows: rows of a batch, at most, where capture found a bound.
        exact: why nothing is padded, in words; None where it is.
    """

    rows: tuple[int, ...]
    lengths: tuple[Mapping[int, int], ...]
    results: tuple[tuple[int, Mapping[int, int]] | None, ...]
    names: tuple[str, ...]
    edges: tuple[tuple[int, ...] | None, ...]
    fills: tuple[float, ...]
    max_rows: float = math.inf
    exact: str | None = None

    def rows_of(self, tensors: Sequence[torch.Tensor]) -> int:
        """How many rows a request has."""
        return int(tensors[0].shape[self.rows[0]])

    def lengths_of(self, tensors: Sequence[torch.Tensor]) -> Lengths:
        """The lengths of a request."""
        found = [0] * len(self.names)
        for tensor, places in zip(tensors, self.lengths, strict=True):
            for dim, place in places.items():
                found[place] = tensor.shape[dim]
        return tuple(found)

    def bucket(self, lengths: Lengths) -> Lengths:
        """The lengths that a request is counted by: those of its bucket, its own above the last edge."""
        if self.exact is not None:
            return lengths
        return tuple(_edge(length, edges) for length, edges in zip(lengths, self.edges, strict=True))

    def join(
        self, requests: Sequence[Sequence[torch.Tensor]], lengths: Lengths, rows: int
    ) -> list[torch.Tensor]:
        """One call for several requests.

        Args:
            requests: the flat tensors of each.
            lengths: what they are padded to; none is longer.
            rows: of the result; the last row is repeated to fill it.
        """
        joined = []
        for place, (row, dims, fill) in enumerate(zip(self.rows, self.lengths, self.fills, strict=True)):
            parts = [_padded(tensors[place], dims, lengths, fill) for tensors in requests]
            missing = rows - sum(part.shape[row] for part in parts)
            if missing:
                parts.append(
                    parts[-1].narrow(row, parts[-1].shape[row] - 1, 1).repeat_interleave(missing, row)
                )
            joined.append(torch.cat(parts, dim=row) if len(parts) > 1 else parts[0])
        return joined

    def split(
        self, outputs: Sequence[Any], requests: Sequence[Sequence[torch.Tensor]], rows: int
    ) -> list[list[Any]]:
        """The results of each request, in memory of their own, with padding taken off.

        Raises:
            RuntimeError: an output has another number of rows than the call.
        """
        for output, rule in zip(outputs, self.results, strict=True):
            if rule is not None and output.shape[rule[0]] != rows:
                raise RuntimeError(f"an output has {output.shape[rule[0]]} rows; the batch has {rows}")
        start, results = 0, []
        for tensors in requests:
            count, lengths = self.rows_of(tensors), self.lengths_of(tensors)
            pairs = zip(outputs, self.results, strict=True)
            results.append([self._part(*pair, start, count, lengths) for pair in pairs])
            start += count
        return results

    def _part(
        self,
        output: Any,
        rule: tuple[int, Mapping[int, int]] | None,
        start: int,
        count: int,
        lengths: Lengths,
    ) -> Any:
        if rule is None:
            return output.clone() if isinstance(output, torch.Tensor) else output
        row, dims = rule
        part = output.narrow(row, start, count)
        for dim, place in dims.items():
            part = part.narrow(dim, 0, lengths[place])
        return part.clone(memory_format=torch.contiguous_format)


def _edge(length: int, edges: tuple[int, ...] | None) -> int:
    place = len(edges or ()) if edges is None else bisect_left(edges, length)
    return length if edges is None or place == len(edges) else edges[place]


def _padded(tensor: torch.Tensor, dims: Mapping[int, int], lengths: Lengths, fill: float) -> torch.Tensor:
    shape = list(tensor.shape)
    for dim, place in dims.items():
        shape[dim] = lengths[place]
    if shape == list(tensor.shape):
        return tensor
    padded = tensor.new_full(shape, fill)
    region = padded
    for dim in dims:
        region = region.narrow(dim, 0, tensor.shape[dim])
    region.copy_(tensor)
    return padded


_POWERS = tuple(2**power for power in range(4, 24))
ONE_BUCKET = _POWERS[-1:]  # for all lengths

Buckets = bool | Sequence[int] | Mapping[str, Sequence[int]]


def layout_of(sizes: Sizes, batch: str | None, buckets: Buckets, pad: Mapping[str, float]) -> Layout | str:
    """How requests are joined, or why they cannot be.

    Args:
        sizes: of the captured graph.
        batch: the user's name of the batch dimension; None for the one called "batch", or else the only one
            that comes first in every input.
        buckets: True for edges at 16, 32, 64, ...; False to pad nothing; edges for all lengths, or by name.
        pad: by input, what padding is made of; 0 where it is not named.

    Raises:
        InputError: a name is unknown, or edges are not ascending numbers above 0.
    """
    found = _batch_symbol(sizes, batch)
    if found is None:
        return "no dynamic dimension stands once in every input and every output"
    symbol, rows, result_rows = found
    symbols = [size for one in sizes.inputs for size in one.sizes if isinstance(size, str) and size != symbol]
    places = {name: place for place, name in enumerate(dict.fromkeys(symbols))}
    names = {symbol: label for one in sizes.inputs for symbol, label in one.names.items()}
    edges = tuple(_edges(buckets, names.get(name, name), sizes.most.get(name)) for name in places)
    _check_names(sizes, [names.get(name, name) for name in places], buckets, pad)
    exact = _why_exact(sizes, places, edges)
    return Layout(
        rows=rows,
        lengths=tuple(_places(one.sizes, places) for one in sizes.inputs),
        results=tuple(
            None if dim is None or output is None else (dim, _places(output, places))
            for dim, output in zip(result_rows, sizes.outputs, strict=True)
        ),
        names=tuple(names.get(name, name) for name in places),
        edges=edges,
        fills=tuple(pad.get(one.path, 0) for one in sizes.inputs),
        max_rows=sizes.most.get(symbol, math.inf),
        exact=exact,
    )


def _batch_symbol(
    sizes: Sizes, batch: str | None
) -> tuple[str, tuple[int, ...], tuple[int | None, ...]] | None:
    """The batch's symbol, with its dimension in every input and every output."""
    first = [size for size in sizes.inputs[0].sizes if isinstance(size, str)] if sizes.inputs else []
    names = {symbol: label for one in sizes.inputs for symbol, label in one.names.items()}
    if batch is not None and batch not in names.values():
        known = ", ".join(sorted(set(names.values()))) or "none"
        raise InputError(f"no dynamic dimension is called {batch!r}", hint=f"the names are: {known}")
    given = _given(size for one in sizes.inputs for size in one.sizes)
    wanted = batch if batch is not None or "batch" not in names.values() else "batch"
    for symbol in dict.fromkeys(first):
        rows = [_only(one.sizes, symbol) for one in sizes.inputs]
        results = [None if output is None else _only(output, symbol) for output in sizes.outputs]
        everywhere = all(row is not None for row in rows) and all(
            output is None or (dim is not None and _given(output) <= given)
            for output, dim in zip(sizes.outputs, results, strict=True)
        )
        if everywhere and (names.get(symbol) == wanted if wanted else set(rows) == {0}):
            return symbol, tuple(row for row in rows if row is not None), tuple(results)
    return None


def _given(sizes: Iterable[Size]) -> frozenset[str]:
    """The symbols of sizes; those of an output that no input has depend on values."""
    return frozenset().union(*map(_symbols, sizes))


def _only(sizes: Sequence[Size], symbol: str) -> int | None:
    """The dimension of a symbol that stands once among sizes, of which none is computed from it."""
    places = [dim for dim, size in enumerate(sizes) if symbol in _symbols(size)]
    return places[0] if len(places) == 1 and sizes[places[0]] == symbol else None


def _symbols(size: Size) -> frozenset[str]:
    return size if isinstance(size, frozenset) else frozenset({size} if isinstance(size, str) else ())


def _places(sizes: Sequence[Size], places: Mapping[str, int]) -> dict[int, int]:
    return {dim: places[size] for dim, size in enumerate(sizes) if isinstance(size, str) and size in places}


def _why_exact(
    sizes: Sizes, places: Mapping[str, int], edges: Sequence[tuple[int, ...] | None]
) -> str | None:
    """Why no request is padded: None where it may be."""
    if not places:
        return "no length is dynamic"
    if all(found is None for found in edges):
        return "buckets=False"
    every = [one.sizes for one in sizes.inputs] + [output for output in sizes.outputs if output is not None]
    if any(isinstance(size, frozenset) for shape in every for size in shape):
        return "a size is computed from a length: where its padding would be is not known"
    return None


def _edges(buckets: Buckets, name: str, most: int | None) -> tuple[int, ...] | None:
    given: Any = buckets.get(name) if isinstance(buckets, Mapping) else buckets
    if given is None or given is False:
        return None
    edges = _POWERS if given is True else tuple(given)
    ascending = all(low < high for low, high in pairwise(edges))
    if not edges or not ascending or not all(isinstance(edge, int) and edge > 0 for edge in edges):
        raise InputError(f"buckets has {list(edges)} for {name!r}", hint="ascending numbers above 0")
    if most is None:
        return edges
    return (*(edge for edge in edges if edge < most), most)


def _check_names(sizes: Sizes, lengths: Sequence[str], buckets: Buckets, pad: Mapping[str, float]) -> None:
    if isinstance(buckets, Mapping):
        for name in buckets.keys() - set(lengths):
            raise InputError(
                f"buckets names {name!r}, which is no dynamic length",
                hint=f"the lengths are: {', '.join(lengths) or 'none'}",
            )
    paths = [one.path for one in sizes.inputs]
    for name in pad.keys() - set(paths):
        raise InputError(f"pad names the input {name!r}", hint=f"the inputs are: {', '.join(paths)}")
