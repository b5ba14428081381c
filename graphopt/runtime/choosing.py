"""Which implementation runs each node of a region: checked against float64, measured, and recorded."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.compiler.device import l2_bytes
from graphopt.compiler.reference import Reference
from graphopt.compiler.tolerance import REGION_FLOOR_ULPS
from graphopt.errors import said
from graphopt.ir.graph import Graph, op_name
from graphopt.kernels._triton import prefetched_weights
from graphopt.kernels._tuning import REPEATS, interleaved, tune
from graphopt.runtime.implementations import Implementation, implementations

Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]

_MOST_COPIES = 100  # of a node's weights
_CACHES = 2.0  # times the L2 cache: so much weight is read before the same one comes again


@dataclass
class Decision:
    """What runs all calls of one signature, and why.

    Args:
        op: what is called: ``aten.linear``.
        shapes: of the tensors that it is called with.
        chosen: the implementation.
        us: microseconds a call by name, for those that were measured.
        refused: by name why an implementation was not taken.
        last: ATen's.
        sizes: all sizes of the tensors that it is called with, in order.
        nodes: names of the nodes that it serves.
    """

    op: str
    shapes: str
    chosen: Implementation
    us: dict[str, float]
    refused: dict[str, str]
    last: Implementation
    sizes: tuple[int, ...] = ()
    nodes: list[str] = field(default_factory=list)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the implementation; should it fail after all, ATen's takes its place from then on."""
        try:
            return self.chosen.run(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel that compiles for one alignment may not for another
            if self.chosen is self.last:
                raise
            self.refused[self.chosen.name] = said(error).splitlines()[0]
            self.chosen = self.last
            return self.last.run(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The decision as values that JSON can hold."""
        return {
            "op": self.op,
            "shapes": self.shapes,
            "chosen": self.chosen.name,
            "us": {name: round(us, 3) for name, us in self.us.items()},
            "refused": dict(self.refused),
            "nodes": list(self.nodes),
        }

    @property
    def reason(self) -> str:
        """In words, for a remark."""
        rows = [f"{name} {us:.1f} us" for name, us in sorted(self.us.items(), key=lambda row: row[1])]
        rows += [f"not {name}: {why}" for name, why in self.refused.items()]
        why = "; ".join(rows) or "the only implementation"
        return f"{self.op} {self.shapes} x{len(self.nodes)} runs on {self.chosen.name}: {why}"


class Choosing:
    """Decides, once a signature, what runs a node.

    Args:
        graph: of the region.
        timed: measure; otherwise the first in the order of preference is taken.
        timer: microseconds of every thunk; by default replays of CUDA graphs in turn.
    """

    def __init__(self, graph: Graph, *, timed: bool, timer: Timer | None = None) -> None:
        self._graph = graph
        self._timed = timed
        self._timer = timer
        self._decisions: dict[Hashable, Decision] = {}

    @property
    def decisions(self) -> list[Decision]:
        """All of them, in the order in which they were taken."""
        return list(self._decisions.values())

    def measured(self) -> dict[str, float]:
        """Microseconds of what was chosen, by node, where it was measured."""
        return {
            name: decision.us[decision.chosen.name]
            for decision in self._decisions.values()
            if decision.chosen.name in decision.us
            for name in decision.nodes
        }

    def settle(self) -> None:
        """Measure nothing from now on: what comes at a user's call is decided by what is known."""
        self._timed = False

    def decide(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decision:
        """What runs a node on these arguments.

        Args:
            node: a call of the region.
            args: real; nothing is written to them.
            kwargs: likewise.
        """
        key = _signature(node, args, kwargs)
        found = self._decisions.get(key)
        if found is None:
            found = self._decisions[key] = self._new(node, args, kwargs)
        if node.name not in found.nodes:
            found.nodes.append(node.name)
        return found

    def _new(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decision:
        ways, refused = implementations(node.target, args, kwargs)
        us: dict[str, float] = {}
        sizes = tuple(size for tensor in _tensors(args, kwargs) for size in tensor.shape)
        best = ways[-1]
        if len(ways) > 1:
            try:
                copies = _copies(node, args) if self._timed else [args]
                tried = ways if self._timed else self._likeliest_first(op_name(node), sizes, ways)
                right = _held_by_graphs(self._right(node, tried, copies, kwargs, refused), refused)
                best = right[0]
                if len(right) > 1:
                    us = self._times(node, right, copies, kwargs)
                    best = min(right, key=lambda way: us[way.name])
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                refused["all but it"] = "memory is too short to compare them"
        return Decision(op_name(node), _shapes(args, kwargs), best, us, refused, ways[-1], sizes)

    def _likeliest_first(
        self, op: str, sizes: tuple[int, ...], ways: Sequence[Implementation]
    ) -> list[Implementation]:
        """The ways, that one first which was measured to be the best for the op at the most similar sizes.

        One that no CUDA graph can hold stays behind all others.
        """
        measured = [row for row in self._decisions.values() if row.op == op and row.us]
        if not measured:
            return list(ways)
        nearest = max(measured, key=lambda row: _likeness(row.sizes, sizes))
        return sorted(ways, key=lambda way: (way.reads_back is not None, way.name != nearest.chosen.name))

    def _right(
        self,
        node: fx.Node,
        ways: Sequence[Implementation],
        copies: Sequence[tuple[Any, ...]],
        kwargs: dict[str, Any],
        refused: dict[str, str],
    ) -> list[Implementation]:
        """Those that run, and are as exact as ATen's, the reference; where nothing is timed, the first one.

        So a shape that is new at a user's call, a bucket's say, is decided by one comparison.
        """
        args = copies[0]
        if ways[0].name == "aten":
            return [ways[0]]
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        given = _given(node, args, kwargs, sources)
        reference = Reference(self._graph, [node], given, REGION_FLOOR_ULPS)
        right: list[Implementation] = []
        for way in ways:
            if right and not self._timed:
                break
            if way.name == "aten":
                right.append(way)
                continue
            try:
                with warnings.catch_warnings(), prefetched_weights(_weights(node, copies)):  # as captured
                    warnings.simplefilter("ignore")  # PyTorch warns of each reason why a backend is none
                    if way.name == "triton" and self._timed:
                        tune(_rotating(way, copies, kwargs), timer=self._timer)
                    found = reference.compare([way.run(*args, **kwargs)])
            except Exception as error:  # whatever a compiler, a library or the driver says: others serve
                refused[way.name] = said(error).splitlines()[0]
                continue
            if found.ok:
                right.append(way)
            else:
                refused[way.name] = found.reason
        return right

    def _times(
        self,
        node: fx.Node,
        ways: Sequence[Implementation],
        copies: Sequence[tuple[Any, ...]],
        kwargs: dict[str, Any],
    ) -> dict[str, float]:
        """Microseconds a call of each, its weights read from memory and not from the L2 cache."""
        calls = -(-len(copies) // REPEATS)

        def several(run: Callable[[], Any]) -> Callable[[], None]:
            def repeat() -> None:
                for _ in range(calls):
                    run()

            return repeat

        thunks = [several(_rotating(way, copies, kwargs)) for way in ways]
        with prefetched_weights(_weights(node, copies)):
            times = (self._timer or interleaved)(thunks)
        return {way.name: time / calls for way, time in zip(ways, times, strict=True)}


def _held_by_graphs(ways: list[Implementation], refused: dict[str, str]) -> list[Implementation]:
    """Those of the ways that a CUDA graph can hold, the others being refused; all where it can hold none."""
    held = [way for way in ways if way.reads_back is None]
    if held:
        refused |= {way.name: way.reads_back for way in ways if way.reads_back is not None}
    return held or ways


def _rotating(
    way: Implementation, copies: Sequence[tuple[Any, ...]], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    """The call, each time on another copy of its weights."""
    turns = itertools.cycle(copies)
    return lambda: way.run(*next(turns), **kwargs)


def _copies(node: fx.Node, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments with so many copies of the weights that the L2 cache cannot hold them."""
    weights = _constant_places(node)
    size = sum(args[index].numel() * args[index].element_size() for index in weights)
    if size == 0:
        return [args]
    count = min(_MOST_COPIES, math.ceil(_CACHES * l2_bytes(args[weights[0]].device) / size))
    others = (tuple(a.clone() if i in weights else a for i, a in enumerate(args)) for _ in range(count - 1))
    copies = [args, *others]
    if args[weights[0]].is_cuda:  # kernels may read them before they wait for the kernels that made them
        torch.cuda.synchronize(args[weights[0]].device)
    return copies


def _constant_places(node: fx.Node) -> list[int]:
    """Which arguments of a call are constants of the graph."""
    return [
        index
        for index, argument in enumerate(node.args)
        if isinstance(argument, fx.Node) and argument.op == "get_attr"
    ]


def _weights(node: fx.Node, copies: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
    """The constants among the arguments, of all copies."""
    return [args[index] for args in copies for index in _constant_places(node)]


def _given(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], sources: Sequence[fx.Node]
) -> dict[fx.Node, Any]:
    """The values of a call's inputs, by node."""
    planned, real = (pytree.tree_leaves(side) for side in ((node.args, node.kwargs), (args, kwargs)))
    return {source: value for source, value in zip(planned, real, strict=True) if source in sources}


def _signature(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What two calls share when one implementation is the best for both."""
    return node.target, repr([_layout(leaf) for leaf in pytree.tree_leaves((args, kwargs))])


def _layout(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return str(leaf.dtype), tuple(leaf.shape), leaf.stride()


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return " ".join("x".join(map(str, tensor.shape)) or "()" for tensor in _tensors(args, kwargs))


def _likeness(sizes: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, float]:
    """How alike the sizes of two calls of one op are: how many are equal, and how near the rest are."""
    if len(sizes) != len(others):
        return -1, 0.0
    pairs = list(zip(sizes, others, strict=True))
    return sum(a == b for a, b in pairs), sum(min(a, b) / max(a, b, 1) for a, b in pairs)
