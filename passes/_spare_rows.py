"""Rows behind the last packed token: a buffer of fixed size has more rows than there are tokens.

They hold whatever is computed of some position's values, NaN perhaps. Nothing may depend on them that leaves
the packed part of a graph: every row is computed from the same row alone, sequences end where the offsets
say, and what is unpacked has a place.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.pattern import describe
from graphopt.kernels.pack_tokens import OP as PACK
from graphopt.kernels.packed_attention import OP as PACKED_ATTENTION
from graphopt.kernels.unpack_tokens import OP as UNPACK
from graphopt.passes._axes import shape
from graphopt.passes._packing import Spot, condition_of, is_offsets, sources
from graphopt.passes._tokens import behind

Rows = dict[fx.Node, int]  # by value, its dimension of packed tokens, counted from the end


def reader_of_spare_rows(graph: Graph, indices: fx.Node) -> str | None:
    """What may depend on rows behind the last token, in words; None where nothing does.

    Args:
        graph: the graph.
        indices: of the tokens, as ``indices_of`` makes them; positions behind the last token would be any.
    """
    condition = condition_of(indices)
    if condition is None:
        return f"{indices.name} is not the list of a mask's tokens"
    rows: Rows = {indices: -1}
    nonzero: Any = indices.args[0]
    other = next((user for user in nonzero.users if user is not indices), None)
    if other is not None:
        return f"{describe(other)} counts the tokens"
    for node in [*graph.calls, graph.output]:
        if not any(source in rows for source in node.all_input_nodes):
            continue
        if node.target is UNPACK.overload and _is_put_back(node, rows, condition):
            continue
        dim = _row_by_row(node, rows, condition)
        if dim is None:
            return f"{'the output' if node is graph.output else describe(node)} reads rows of no token"
        rows[node] = dim
    return None


def _is_put_back(unpack: fx.Node, rows: Rows, condition: fx.Node) -> bool:
    """True for tokens that go where they came from: it gives each place its token, and the rest zeros."""
    packed: Any = unpack.args[0]
    return unpack.args[1] is condition and packed in rows and rows[packed] == 1 - len(shape(packed))


def _row_by_row(node: fx.Node, rows: Rows, condition: fx.Node) -> int | None:
    """Where a call's result has packed tokens, each computed of that token alone or of its sequence's."""
    if node.op != "call_function":
        return None
    read = {source: dim for source, dim in rows.items() if source in node.all_input_nodes}
    if node.target is PACK.overload:
        return 1 - len(shape(node)) if list(read) == [node.args[1]] else None
    if node.target is PACKED_ATTENTION.overload:
        ours = set(node.args[:3]) == set(read) and set(read.values()) == {-3}
        return -3 if ours and is_offsets(node.args[3], condition) else None
    rank = len(shape(node))
    leading = sources(node, Spot.leading(rank)) if rank > 1 else None
    if leading and all(source in leading and leading[source].token == dim for source, dim in read.items()):
        return 1 - rank
    for dim in range(-rank, 0):
        found = behind(node, dim, last=False)
        if found and all(found.get(source) == its for source, its in read.items()):
            return dim
    return None
