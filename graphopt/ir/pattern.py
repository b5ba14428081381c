"""Patterns over a Graph, and what they match.

A pattern is a tree of ``Call`` nodes over ``Var`` leaves. It is matched from its root upwards against the
producers of a node. Arguments are compared by the op's schema: those that a ``Call`` does not name must have
their default value, so ``add(x, y, alpha=2)`` is not an addition by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph, op_name, users_outside

ANY: Any = object()  # in a Call: this argument may be anything


@dataclass(frozen=True)
class Match:
    """One place where a pass applies.

    Args:
        graph: where it was found.
        root: the last node of the matched region.
        nodes: every matched call, in topological order, the root last.
        bindings: what the pattern's names stand for: nodes or literals.
    """

    graph: Graph
    root: fx.Node
    nodes: tuple[fx.Node, ...]
    bindings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What a name stands for, or the default when the pattern matched without it."""
        return self.bindings.get(name, default)

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes that feed the matched region from outside, in order of first use."""
        inside = set(self.nodes)
        feeding = (source for node in self.nodes for source in node.all_input_nodes)
        return list(dict.fromkeys(source for source in feeding if source not in inside))

    def val(self, name: str) -> torch.Tensor:
        """The fake value of a bound node: its shape, dtype and device."""
        value: torch.Tensor = self.bindings[name].meta["val"]
        return value

    def constant(self, name: str) -> torch.Tensor | None:
        """The value of a bound node when it is a constant, else None."""
        return self.graph.constant(self.bindings.get(name))


@dataclass
class NearMiss:
    """The furthest that a pattern got before it stopped.

    Args:
        nodes: the calls that did match.
        found: the node, or the literal, at which it stopped.
        expected: what should have stood there, in words.
    """

    nodes: tuple[fx.Node, ...] = ()
    found: Any = None
    expected: str = ""

    def note(self, nodes: tuple[fx.Node, ...], found: Any, expected: str) -> None:
        """Keep this failure if it lies deeper than what is kept."""
        if len(nodes) > len(self.nodes):
            self.nodes, self.found, self.expected = nodes, found, expected

    @property
    def reason(self) -> str:
        """The miss in words: the first node that does not fit, and what was expected there."""
        found = describe(self.found) if isinstance(self.found, fx.Node) else repr(self.found)
        return f"near miss: expected {self.expected} at {describe(self.nodes[-1])}, found {found}"


_State = tuple[dict[str, Any], tuple[fx.Node, ...]]


class Pattern:
    """What a value must look like.

    ``roots`` are the ops that its last call may have (None: any value will do), ``size`` is the number of
    calls in its smallest spelling.
    """

    roots: frozenset[Any] | None = None
    size: int = 0

    def walk(self, value: Any, state: _State, miss: NearMiss) -> Iterator[_State]:
        """Every way in which the value fits, each with the bindings and nodes collected so far."""
        raise NotImplementedError

    def match(self, graph: Graph, root: fx.Node, miss: NearMiss | None = None) -> Match | None:
        """The first way in which the pattern fits at a node, or None."""
        for bindings, nodes in self.walk(root, ({}, ()), miss or NearMiss()):
            return Match(graph, root, tuple(sorted(dict.fromkeys(nodes))), bindings)
        return None


@dataclass(frozen=True)
class Var(Pattern):
    """Any value; the same name twice must be the same value.

    Args:
        name: under which it is bound; "" binds nothing.
        where: a condition on the value (a node, or a literal).
        expects: the condition in words, for near misses.
    """

    name: str = ""
    where: Callable[[Any], bool] | None = None
    expects: str = "something else"

    def walk(self, value: Any, state: _State, miss: NearMiss) -> Iterator[_State]:
        """Bind the value unless the condition or an earlier binding forbids it."""
        bindings, nodes = state
        if self.where is not None and not self.where(value):
            miss.note(nodes, value, self.expects)
            return
        if not self.name:
            yield state
        elif self.name not in bindings:
            yield {**bindings, self.name: value}, nodes
        elif _same(bindings[self.name], value):
            yield state
        else:
            miss.note(nodes, value, f"the same value as {self.name}")


def _same(left: Any, right: Any) -> bool:
    return left is right if isinstance(left, fx.Node) or isinstance(right, fx.Node) else bool(left == right)


class Call(Pattern):
    """A call of an op.

    Args:
        target: the op, or several that are equivalent here.
        args: patterns or literals by position; ``ANY`` for "whatever".
        name: binds the node itself.
        commutative: also try the first two arguments swapped.
        kwargs: patterns or literals by the schema's argument names.
    """

    def __init__(
        self, target: Any, *args: Any, name: str = "", commutative: bool = False, **kwargs: Any
    ) -> None:
        self.targets = tuple(target) if isinstance(target, (tuple, list)) else (target,)
        self.args = args
        self.name = name
        self.commutative = commutative
        self.kwargs = kwargs
        self.roots = frozenset(self.targets)
        self.size = 1 + sum(_size(wanted) for wanted in (*args, *kwargs.values()))

    def walk(self, value: Any, state: _State, miss: NearMiss) -> Iterator[_State]:
        """Match the target, then argument by argument, going back where an alternative is left."""
        bindings, nodes = state
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in self.targets:
            miss.note(nodes, value, " or ".join(_target_name(target) for target in self.targets))
            return
        if self.name:
            if bindings.get(self.name, value) is not value:
                return
            bindings = {**bindings, self.name: value}
        given = arguments(value)
        names = list(given)
        orders = [self.args]
        if self.commutative:
            orders.append((self.args[1], self.args[0], *self.args[2:]))
        for order in orders:
            wanted = {**dict(zip(names, order, strict=False)), **self.kwargs}
            pairs = [(wanted.get(name, default), given[name][0]) for name, (_, default) in given.items()]
            yield from _all(pairs, (bindings, (*nodes, value)), miss)


def _all(pairs: list[tuple[Any, Any]], state: _State, miss: NearMiss) -> Iterator[_State]:
    if not pairs:
        yield state
        return
    (wanted, value), *rest = pairs
    if wanted is ANY:
        yield from _all(rest, state, miss)
    elif isinstance(wanted, Pattern):
        for found in wanted.walk(value, state, miss):
            yield from _all(rest, found, miss)
    elif isinstance(wanted, (list, tuple)) and any(isinstance(item, Pattern) for item in wanted):
        if isinstance(value, (list, tuple)) and len(value) == len(wanted):
            yield from _all([*zip(wanted, value, strict=True), *rest], state, miss)
        else:
            miss.note(state[1], value, f"{len(wanted)} values")
    elif _same(wanted, value):
        yield from _all(rest, state, miss)
    else:
        miss.note(state[1], value, repr(wanted))


def _size(wanted: Any) -> int:
    if isinstance(wanted, (list, tuple)):
        return sum(map(_size, wanted))
    return wanted.size if isinstance(wanted, Pattern) else 0


@dataclass(frozen=True)
class Or(Pattern):
    """The first of several patterns that leads to a match."""

    patterns: tuple[Pattern, ...]

    def __init__(self, *patterns: Pattern) -> None:
        object.__setattr__(self, "patterns", patterns)
        roots = [pattern.roots for pattern in patterns]
        known = [targets for targets in roots if targets is not None]
        object.__setattr__(self, "roots", frozenset().union(*known) if len(known) == len(roots) else None)
        object.__setattr__(self, "size", min(pattern.size for pattern in patterns))

    def walk(self, value: Any, state: _State, miss: NearMiss) -> Iterator[_State]:
        """Try each in order."""
        for pattern in self.patterns:
            yield from pattern.walk(value, state, miss)


def arguments(node: fx.Node) -> dict[str, tuple[Any, Any]]:
    """A call's arguments by schema name, each with its default (``inspect``-like, defaults filled in)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): (value, ANY) for i, value in enumerate(node.args)}
    found: dict[str, tuple[Any, Any]] = {}
    for index, argument in enumerate(target._schema.arguments):
        default: Any = argument.default_value if argument.has_default_value() else _REQUIRED
        if argument.name in node.kwargs:
            value: Any = node.kwargs[argument.name]
        elif index < len(node.args):
            value = node.args[index]
        else:
            value = default
        found[argument.name] = (value, default)
    return found


_REQUIRED = object()


def argument(node: fx.Node, name: str) -> Any:
    """One argument of a call by its schema name, the default where the call leaves it out."""
    return arguments(node)[name][0]


def shared_inside(match: Match, outputs: Iterable[fx.Node] = ()) -> tuple[fx.Node, fx.Node] | None:
    """A matched node that something outside also reads, with that reader; None when there is none.

    Args:
        match: the match.
        outputs: nodes whose outside readers the rewrite serves; the root is always one.
    """
    served = {match.root, *outputs}
    for node in match.nodes:
        if node not in served:
            for user in users_outside(node, match.nodes):
                return node, user
    return None


def _target_name(target: Any) -> str:
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    )


def describe(node: fx.Node) -> str:
    """A node for messages: its op and its name."""
    return f"{op_name(node)} ({node.name})"
