"""What a pass is, and the registry of passes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, NearMiss, Pattern

if TYPE_CHECKING:
    from graphopt.compiler.rewriter import Rewriter

Kind = Literal["prune", "fold", "fuse"]
Finder = Callable[[Graph], Iterable[Match]]


def always(match: Match) -> str | None:
    """The check of a pass whose pattern says everything."""
    return None


@dataclass(frozen=True)
class Pass:
    """One graph rewrite: where it applies, when it refuses, and what it puts there instead.

    A pass describes; the pass manager stages what ``rewrite`` builds beside the matched region, verifies it,
    and then wires it in or throws it away. A pass never lints, recompiles, times or logs.

    Args:
        name: ``verb_object``, the name of its file.
        kind: its family.
        pattern: what it matches: a pattern, tried at every node, or a function that yields matches.
        rewrite: builds the replacement with the ``Rewriter`` and says what it replaces.
        check: the reason why a match is refused, or None.
        level: the lowest optimization level at which it runs.
        exact: only the order of additions may differ from the original.
    """

    name: str
    kind: Kind
    pattern: Pattern | Finder
    rewrite: Callable[[Rewriter, Match], None]
    check: Callable[[Match], str | None] = always
    level: int = 1
    exact: bool = True

    def matches(self, graph: Graph, miss: NearMiss | None = None) -> Iterator[Match]:
        """Every match, found while the graph is being rewritten: erased nodes are passed over."""
        if not isinstance(self.pattern, Pattern):
            yield from self.pattern(graph)
            return
        for node in graph.calls:
            if not node._erased:
                found = self.pattern.match(graph, node, miss)
                if found is not None:
                    yield found


PASSES: dict[str, Pass] = {}


def register(rule: Pass) -> Pass:
    """Add a pass to the catalogue, so that it can be named; returns it.

    Raises:
        PassError: a pass of that name is registered already.
    """
    if rule.name in PASSES:
        raise PassError(f"pass {rule.name!r} is registered already")
    PASSES[rule.name] = rule
    return rule


def find(name: str) -> Pass:
    """The pass of that exact name.

    Raises:
        PassError: there is none; near names are listed.
    """
    if name not in PASSES:
        near = difflib.get_close_matches(name, PASSES, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"the passes are: {', '.join(sorted(PASSES))}"
        raise PassError(f"there is no pass {name!r}", hint=hint)
    return PASSES[name]
