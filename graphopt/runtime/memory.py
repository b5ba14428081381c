"""The memory plan: how long each value lives, and where it lies in one block that all of them share.

Lifetimes come from a graph's order alone. Two values that live at the same time never overlap; one that a
pointwise call makes may take the place of a value that dies in that call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.compiler.cost import VIEWS
from graphopt.ir.graph import Graph, is_getitem, is_symbolic, same_shape, tensor_bytes
from graphopt.ir.op import op_of

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of a CPU

Roots = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Buffer:
    """Memory from the call that fills it to the last one that reads it, or a view of it.

    Args:
        name: of the value.
        bytes: how large.
        first: place of the call that writes it, among all calls.
        last: place of the last one that reads it; the number of calls for what is returned.
        instead_of: the buffer that it may take over: it dies in the call that writes this one, and that call
            reads each number before it writes it.
    """

    name: str
    bytes: int
    first: int
    last: int
    instead_of: str = ""


@dataclass(frozen=True)
class Layout:
    """Where buffers lie in one block.

    Args:
        offsets: in bytes, by name; each a multiple of the alignment.
        bytes: how large the block is.
        needed: what no layout can be below: the most bytes alive at once.
        total: what the buffers take where each has memory of its own.
    """

    offsets: dict[str, int]
    bytes: int
    needed: int
    total: int


# Lifetimes


def lives(calls: Sequence[fx.Node], returned: Collection[str], roots: Roots) -> dict[str, tuple[int, int]]:
    """The first and the last place of each memory in a sequence of calls.

    Args:
        calls: in the order in which they run, told apart by their names.
        returned: names of values that are given to the caller.
        roots: by value, the names of the values whose memory it may lie in.

    Returns:
        Places by name; what is returned lives until after the last call.
    """
    found: dict[str, tuple[int, int]] = {}

    def extend(value: str, place: int) -> None:
        for root in roots.get(value, ()):
            if root in found:
                found[root] = found[root][0], max(found[root][1], place)

    for place, node in enumerate(calls):
        if node.name in roots.get(node.name, ()):
            found[node.name] = place, place
        for source in node.all_input_nodes:
            extend(source.name, place)
    for name in returned:
        extend(name, len(calls))
    return found


def owners(calls: Sequence[fx.Node]) -> Roots:
    """Whose memory each value lies in, for accounting: a view lies in what it looks at."""
    found: dict[str, frozenset[str]] = {}
    for node in calls:
        sources = [source.name for source in node.all_input_nodes if source.op != "get_attr"]
        is_view = (node.target in VIEWS or is_getitem(node)) and bool(sources)
        found[node.name] = (
            found.get(sources[0], frozenset({sources[0]})) if is_view else frozenset({node.name})
        )
    return found


def possible_owners(calls: Sequence[fx.Node]) -> Roots:
    """Whose memory each value may lie in, whatever its call does.

    An op that PyTorch composes of others may hand back its input without saying so (dropout in evaluation, an
    einsum that only permutes), so that of such a call every input counts, and the value itself.
    """
    found: dict[str, frozenset[str]] = {}
    for node in calls:
        held = frozenset() if is_symbolic(node) else frozenset({node.name})
        if not makes_its_own(node):
            for source in node.all_input_nodes:
                held |= found.get(source.name, frozenset())
        found[node.name] = held
    return found


def makes_its_own(node: fx.Node) -> bool:
    """True for a call whose results share memory with none of its inputs."""
    if op_of(node.target) is not None:
        return True  # PyTorch forbids its custom ops anything else
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases = any(value.alias_info is not None for value in node.target._schema.returns)
    return not aliases and (not is_composed(node.target) or node.target in _COMPOSED_FRESH)


def is_composed(target: torch._ops.OpOverload) -> bool:
    """True for an op that PyTorch has no kernel of: it calls others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


# Composed ops that never give back an input: they end in a product, or in one that makes its result.
_COMPOSED_FRESH = frozenset(
    {
        torch.ops.aten.linear.default,
        torch.ops.aten.layer_norm.default,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten.softmax.int,
    }
)


def values_of(graphs: Sequence[Graph]) -> list[Buffer]:
    """The values that graphs compute one after the other, views left out, each with its size at the example.

    Args:
        graphs: the regions of a plan in order, or one whole graph; what one hands to the next has one name.
    """
    calls = [node for graph in graphs for node in graph.calls]
    returned = [node.name for node in graphs[-1].output.all_input_nodes] if graphs else []
    spans = lives(calls, returned, owners(calls))
    sizes = {node.name: int(tensor_bytes(node.meta.get("val"))) for node in calls}
    return [Buffer(name, sizes[name], first, last) for name, (first, last) in spans.items()]


def peak_bytes(graphs: Sequence[Graph]) -> int:
    """The most bytes of values that are alive at once, at the sizes of the example."""
    return sum(value.bytes for value in most_alive(values_of(graphs)))


# Sizes


def bytes_of(val: Any, sizes: Mapping[Any, int]) -> int | None:
    """Bytes of a fake tensor, its symbols replaced by numbers; None where a symbol has none.

    Args:
        val: the tensor.
        sizes: numbers by symbol, as ``bind`` finds them.
    """
    total = val.element_size()
    for size in val.shape:
        number = number_of(size, sizes)
        if number is None:
            return None
        total *= number
    return int(total)


def number_of(size: Any, sizes: Mapping[Any, int]) -> int | None:
    """A size as a number; None where it depends on a symbol that has none."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    found = size.node.expr.xreplace(sizes)  # a symbol alone becomes the plain number
    return int(found) if isinstance(found, int) or found.is_Integer else None


def bind(placeholders: Sequence[fx.Node], shapes: Sequence[Sequence[int]]) -> dict[Any, int]:
    """The numbers of the symbols in the shapes of inputs.

    Args:
        placeholders: the inputs as captured.
        shapes: of the tensors that are given for them.
    """
    found: dict[Any, int] = {}
    for node, shape in zip(placeholders, shapes, strict=True):
        for size, number in zip(node.meta["val"].shape, shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found[size.node.expr] = number
    return found


# In place


def takes_over(
    node: fx.Node, place: int, spans: Mapping[str, tuple[int, int]], roots: Roots, own: Collection[str]
) -> str:
    """The buffer among ``own`` that a call may write its result into; "" for none.

    The call is pointwise; the source has its result's shape and dtype, is nothing but its own memory, and
    neither it nor a view of it is read later, or returned.
    """
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return ""
    val = node.meta["val"]
    for source in node.all_input_nodes:
        if source.name not in own or roots.get(source.name) != frozenset({source.name}):
            continue
        other = source.meta["val"]
        alike = other.dtype == val.dtype and same_shape(other.shape, val.shape)
        if alike and spans[source.name][1] == place and _read_as_it_is(node, source, roots):
            return source.name
    return ""


def _read_as_it_is(node: fx.Node, source: fx.Node, roots: Roots) -> bool:
    """True unless the call also reads the source's memory through a view, in another order."""
    others = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
    return all(other is source or source.name not in roots.get(other.name, ()) for other in others)


# Places


def lay_out(buffers: Sequence[Buffer], alignment: int = ALIGNMENT) -> Layout:
    """Offsets in one block, so that buffers alive at the same time do not overlap.

    Each buffer goes into the smallest gap that holds it between those placed before it that live at the same
    time. Placing the largest first is best for most graphs, and those that live longest first for others; the
    smaller block wins. It is at most as large as all buffers one after the other.

    Args:
        buffers: of any size; what takes over another's place has to be larger than it in no dimension.
        alignment: of every offset, in bytes.

    Raises:
        ValueError: a buffer takes over one that is not there, is smaller, or lives on.
    """
    groups = _merged(buffers)
    spans = {name: _span(group) for name, group in groups.items()}
    sized = [replace(span, bytes=-(-span.bytes // alignment) * alignment) for span in spans.values()]
    orders: list[Callable[[Buffer], Any]] = [
        lambda b: (-b.bytes, b.first),
        lambda b: (b.first - b.last, -b.bytes),
        lambda b: (b.first, -b.bytes),
    ]
    offsets = min((_placed(sorted(sized, key=key)) for key in orders), key=lambda found: _end(found, sized))
    return Layout(
        {buffer.name: offsets[name] for name, group in groups.items() for buffer in group},
        _end(offsets, sized),
        sum(buffer.bytes for buffer in most_alive(sized)),
        sum(-(-buffer.bytes // alignment) * alignment for buffer in buffers),
    )


def most_alive(buffers: Sequence[Buffer]) -> list[Buffer]:
    """The buffers that are alive at the first moment at which they take the most bytes."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.first] = changes.get(buffer.first, 0) + buffer.bytes
        changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - buffer.bytes
    most, worst, now = 0, -1, 0
    for place in sorted(changes):
        now += changes[place]
        if now > most:
            most, worst = now, place
    return [buffer for buffer in buffers if buffer.first <= worst <= buffer.last]


def _merged(buffers: Sequence[Buffer]) -> dict[str, list[Buffer]]:
    """The buffers by the first of those that one place is handed on to."""
    head: dict[str, str] = {}
    groups: dict[str, list[Buffer]] = {}
    for buffer in sorted(buffers, key=lambda b: b.first):
        if not buffer.instead_of:
            head[buffer.name], groups[buffer.name] = buffer.name, [buffer]
            continue
        group = groups.get(head.get(buffer.instead_of, ""), [])
        before = group[-1] if group else None
        if (
            before is None
            or before.name != buffer.instead_of
            or before.bytes < buffer.bytes
            or before.last > buffer.first
            or before.first == buffer.first  # what both are made of lives as well
        ):
            raise ValueError(f"{buffer.name} cannot take the place of {buffer.instead_of}")
        head[buffer.name] = head[buffer.instead_of]
        group.append(buffer)
    return groups


def _span(group: Sequence[Buffer]) -> Buffer:
    return replace(group[0], last=max(buffer.last for buffer in group))


def _placed(buffers: Sequence[Buffer]) -> dict[str, int]:
    offsets: dict[str, int] = {}
    placed: list[Buffer] = []
    for buffer in buffers:
        beside = sorted(
            (offsets[other.name], other.bytes)
            for other in placed
            if other.first <= buffer.last and buffer.first <= other.last
        )
        offsets[buffer.name] = _best_gap(beside, buffer.bytes)
        placed.append(buffer)
    return offsets


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The offset of the smallest gap between what is taken that holds so much, else behind all of it."""
    end, best, room = 0, -1, 0
    for offset, length in taken:
        gap = offset - end
        if gap >= size and (best < 0 or gap < room):
            best, room = end, gap
        end = max(end, offset + length)
    return best if best >= 0 else end


def _end(offsets: Mapping[str, int], buffers: Sequence[Buffer]) -> int:
    return max((offsets[buffer.name] + buffer.bytes for buffer in buffers), default=0)
