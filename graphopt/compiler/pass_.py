"""What a pass is, and the registry of passes: graphopt's own, and the user's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal

from graphopt.errors import PassError, said
from graphopt.ir.graph import Graph
from graphopt.ir.pattern import Match, NearMiss, Pattern

if TYPE_CHECKING:
    from graphopt.compiler.rewriter import Rewriter

Kind = Literal["prune", "fold", "fuse", "cast"]
Finder = Callable[[Graph], Iterable[Match]]
ENTRY_POINTS = "graphopt.passes"  # the group under which an installed package offers its passes


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
        kind: its family. Passes of the kind ``cast`` compute the same in another number format: they run
            behind all others, on sites that do not depend on each other.
        pattern: what it matches: a pattern, tried at every node, or a function that yields matches.
        rewrite: builds the replacement with the ``Rewriter`` and says what it replaces.
        check: the reason why a match is refused, or None.
        level: the lowest optimization level at which it runs.
        exact: only the order of additions may differ from the original. A pass that is not exact runs only
            when it is enabled by name and a loss is allowed.
        opens: names of passes that find new work where this one did some: they run again, to a fixed point.
        after: the pass behind which a user's pass runs; None is behind all others.
    """

    name: str
    kind: Kind
    pattern: Pattern | Finder
    rewrite: Callable[[Rewriter, Match], None]
    check: Callable[[Match], str | None] = always
    level: int = 1
    exact: bool = True
    opens: tuple[str, ...] = ()
    after: str | None = None

    def matches(self, graph: Graph, on_miss: Callable[[NearMiss], None] | None = None) -> Iterator[Match]:
        """Every match, found while the graph is being rewritten: erased nodes are passed over.

        Args:
            graph: the graph.
            on_miss: called with each near miss: a place where at least half of the pattern fits.
        """
        if not isinstance(self.pattern, Pattern):
            yield from self.pattern(graph)
            return
        roots = self.pattern.roots
        for node in graph.calls:
            if node._erased or (roots is not None and node.target not in roots):
                continue
            miss = NearMiss()
            found = self.pattern.match(graph, node, miss)
            if found is not None:
                yield found
            elif on_miss is not None and 1 < len(miss.nodes) < self.pattern.size <= 2 * len(miss.nodes):
                on_miss(miss)


PASSES: dict[str, Pass] = {}
_users: list[str] = []  # names of the passes that are not graphopt's own, in order of registration


def register(rule: Pass) -> Pass:
    """Add a pass to the catalogue, so that it can be named; returns it.

    Raises:
        PassError: a pass of that name is registered already.
    """
    if rule.name in PASSES:
        raise PassError(f"pass {rule.name!r} is registered already")
    PASSES[rule.name] = rule
    return rule


def custom_pass(
    kind: Kind,
    *,
    name: str | None = None,
    after: str | None = None,
    level: int = 1,
    exact: bool = True,
    opens: tuple[str, ...] = (),
) -> Callable[[type], Pass]:
    """Register a pass of your own: a class of the same three functions, which becomes a ``Pass``.

    It then runs in every ``optimize``, verified, reported and bisected like any other::

        @custom_pass("fuse", after="fuse_linear")
        class FuseScaledTanh:
            pattern = Call(aten.mul.Tensor, Call(aten.tanh.default, Var("x")), 2.0)

            def check(match): ...
            def rewrite(rewriter, match): ...

    A package offers its passes by an entry point of the group ``graphopt.passes`` that names the module.

    Args:
        kind: its family: ``"prune"``, ``"fold"``, ``"fuse"`` or ``"cast"``.
        name: ``verb_object``; the class's name in snake case by default.
        after: the pass behind which it runs; behind all others by default.
        level: the lowest optimization level at which it runs.
        exact: see ``Pass``.
        opens: see ``Pass``.

    Raises:
        PassError: the class has no pattern or no rewrite, the name is taken, or ``after`` is unknown.
    """

    def decorate(described: type) -> Pass:
        known = name or re.sub(r"(?<!^)(?=[A-Z])", "_", described.__name__).lower()
        parts: dict[str, Any] = {part: getattr(described, part, None) for part in ("pattern", "rewrite")}
        for part, given in parts.items():
            if given is None:
                raise PassError(f"pass {known!r} has no {part}", where=described.__qualname__)
        check = getattr(described, "check", always)
        rule = register(
            Pass(known, kind, **parts, check=check, level=level, exact=exact, opens=opens, after=after)
        )
        _users.append(known)
        return rule

    return decorate


def users_passes() -> list[Pass]:
    """The passes that users registered, in that order; entry points are loaded first.

    Raises:
        PassError: an entry point cannot be loaded.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            raise PassError(
                f"the passes of {point.value!r} cannot be loaded: {said(error)}",
                where=f"entry point {point.name!r} of group {ENTRY_POINTS!r}",
                hint="mend or uninstall the package that offers them",
            ) from error
    return [PASSES[name] for name in _users]


def forget(name: str) -> None:
    """Take a user's pass out of the catalogue again.

    Raises:
        PassError: there is none of that name, or it is graphopt's own.
    """
    if find(name).name not in _users:
        raise PassError(f"pass {name!r} is graphopt's own", hint=f"disable={name!r} leaves it out")
    _users.remove(name)
    del PASSES[name]


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
