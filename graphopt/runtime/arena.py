"""Values of a region in one block of memory that is kept from call to call.

What PyTorch allocates and frees a call, the C library maps and unmaps where it is large, and every page of it
is cleared by the kernel when it is first written. Only ops that can write into memory that is given to them
take part: those with an ``out`` form of their own, and products. The forms that PyTorch generates compute
elsewhere and copy, so they are left out; so is what is returned, and whatever may share memory with it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from graphopt.ir.graph import Graph, tensor_bytes
from graphopt.runtime.memory import (
    Buffer,
    Layout,
    bind,
    bytes_of,
    is_composed,
    lay_out,
    lives,
    number_of,
    possible_owners,
    takes_over,
)

aten = torch.ops.aten

_SHAPES = 8  # of inputs that blocks are kept for
# Bytes of a value. What the C library maps anew each call costs 6,400 page faults in a layer of BERT-base at
# 8x128, and 185 ms of CPU time instead of 177 (one thread, PyTorch 2.13); where all values are small, handing
# memory over costs more than it saves: a layer of width 256 at 1x16 takes 1.07 ms instead of 0.86.
_WORTH_PLANNING = 2**20

Into = Callable[..., Any]

# Composed ops whose ``out`` form is composed of the same calls.
_SAME_WAY = frozenset({aten.matmul.default, aten.softmax.int})


def into(node: fx.Node) -> Into | None:
    """What runs a call with its result in memory given as ``out``, to the last bit as the call itself.

    None where there is no such form, or it would have to copy.
    """
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.device.type != "cpu" or val.layout is not torch.strided:
        return None
    if not val.is_contiguous() or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target is aten.linear.default:
        return _linear_into if node.args[0].meta["val"].is_contiguous() else None  # type: ignore[union-attr]
    return _out_form(node.target)


def _out_form(target: torch._ops.OpOverload) -> Into | None:
    """The overload with the same arguments and ``out`` besides, if somebody wrote its kernel.

    A composed op may take another way with ``out`` (the mean that ``adaptive_avg_pool2d`` is for one pixel),
    so that of these only the named ones count.
    """
    if is_composed(target) and target not in _SAME_WAY:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        form = getattr(target.overloadpacket, name)
        outs = [argument for argument in form._schema.arguments if argument.is_out]
        others = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out]
        if (
            len(outs) == 1
            and outs[0].name == "out"
            and others == wanted
            and torch.Tag.generated not in form.tags
        ):
            return cast(Into, form)
    return None


def _linear_into(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor
) -> torch.Tensor:
    """As ``aten.linear`` computes it for a contiguous input: one product of two matrices, the bias in it."""
    x_MK, out_MN = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(x_MK, weight.t(), out=out_MN)
    else:
        torch.addmm(bias, x_MK, weight.t(), out=out_MN)
    return out


@dataclass(frozen=True)
class Planned:
    """A value that lies in the block.

    Args:
        node: the call that makes it.
        first: see ``Buffer``.
        last: likewise.
        instead_of: likewise.
    """

    node: fx.Node
    first: int
    last: int
    instead_of: str

    def buffer(self, sizes: Mapping[Any, int]) -> Buffer:
        """With its size, the symbols in its shape being these numbers."""
        size = bytes_of(self.node.meta["val"], sizes)
        assert size is not None
        return Buffer(self.node.name, size, self.first, self.last, self.instead_of)


def planned(graph: Graph) -> list[Planned]:
    """The values of a graph that can lie in a block: those that nobody outside sees."""
    calls = graph.calls
    roots = possible_owners(calls)
    returned = [node.name for node in graph.output.all_input_nodes]
    spans = lives(calls, returned, roots)
    symbols = bind(graph.placeholders, [node.meta["val"].shape for node in graph.placeholders])
    own: dict[str, Planned] = {}
    for place, node in enumerate(calls):
        if spans.get(node.name, (0, len(calls)))[1] == len(calls) or _depends_on_values(node, symbols):
            continue
        if into(node) is None:
            continue
        above = takes_over(node, place, spans, roots, own)
        own[node.name] = Planned(node, *spans[node.name], above)
    return list(own.values())


def _depends_on_values(node: fx.Node, symbols: Collection[Any]) -> bool:
    """True when the size of a call's result follows from values of the inputs, not from their shapes."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and bytes_of(val, dict.fromkeys(symbols, 1)) is None


def arena_for(graph: Graph) -> Arena | None:
    """The arena of a region, where one is worth it; None otherwise."""
    values = [value for value in planned(graph) if tensor_bytes(value.node.meta["val"]) >= _WORTH_PLANNING]
    return Arena(graph, values) if values else None


class Arena:
    """A graph whose values lie in a block, as far as they can.

    Args:
        graph: of a region; it stays as it is.
        values: those of its values that lie in the block.

    Attributes:
        layouts: where they lie, by the shapes of the inputs.
    """

    def __init__(self, graph: Graph, values: Sequence[Planned]) -> None:
        self._placeholders = graph.placeholders
        self._planned = list(values)
        self.layouts: OrderedDict[Any, Layout] = OrderedDict()
        self._free: dict[Any, list[list[torch.Tensor]]] = {}
        self._lock = threading.Lock()
        self.module = _with_buffers(graph, self._planned)

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the graph; what it returns is not in the block. Calls at the same time have a block each."""
        with self._buffers(inputs) as buffers:
            results: Sequence[Any] = self.module.forward(*inputs, *buffers)
        return results

    def describe(self) -> dict[str, Any]:
        """Values in the block, its bytes for all shapes that it is kept for, and the least possible."""
        with self._lock:
            layouts = list(self.layouts.values())
        return {
            "block_values": len(self._planned),
            "block_bytes": sum(layout.bytes for layout in layouts),
            "block_bytes_needed": sum(layout.needed for layout in layouts),
        }

    @contextmanager
    def _buffers(self, inputs: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        key = tuple(tensor.shape for tensor in inputs)
        with self._lock:
            free = self._free.get(key)
            buffers = free.pop() if free else None
        if buffers is None:
            buffers = self._new(key)
        try:
            yield buffers
        finally:
            with self._lock:
                if key in self._free:
                    self._free[key].append(buffers)

    def _new(self, key: tuple[torch.Size, ...]) -> list[torch.Tensor]:
        """Views into a fresh block; the shapes that came first make room."""
        sizes = bind(self._placeholders, key)
        layout = lay_out([value.buffer(sizes) for value in self._planned])
        with self._lock:
            self.layouts[key] = layout
            self._free.setdefault(key, [])
            if len(self.layouts) > _SHAPES:
                oldest, _ = self.layouts.popitem(last=False)
                del self._free[oldest]
        block = torch.empty(layout.bytes, dtype=torch.uint8)
        return [_view(block, layout.offsets[v.node.name], v.node.meta["val"], sizes) for v in self._planned]


def _view(block: torch.Tensor, offset: int, val: torch.Tensor, sizes: Mapping[Any, int]) -> torch.Tensor:
    shape = [number_of(size, sizes) or 0 for size in val.shape]
    length = math.prod(shape) * val.element_size()
    return block[offset : offset + length].view(val.dtype).view(shape)


def _with_buffers(graph: Graph, values: Sequence[Planned]) -> fx.GraphModule:
    """The graph with a parameter more for each planned value, which its call writes into."""
    copied = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph.fx, made))
    behind = [made[node] for node in graph.placeholders]
    first = next(iter(copied.nodes))
    for value in values:
        node = made[value.node]
        place = copied.inserting_after(behind[-1]) if behind else copied.inserting_before(first)
        with place:
            behind.append(copied.placeholder(f"{node.name}_buffer"))
        form = into(value.node)
        assert form is not None
        node.target = form
        node.kwargs = {**node.kwargs, "out": behind[-1]}
    return fx.GraphModule(graph.module, copied)
