"""Building a replacement beside the region it replaces, to be wired in only once it is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, same_shape, writes_in_place
from graphopt.ir.pattern import Match


class Rewriter:
    """What a pass's ``rewrite`` works with: one match, one staged replacement.

    Args:
        match: the region to replace.
        pass_name: who replaces it, for the record of folded constants.
    """

    def __init__(self, match: Match, pass_name: str) -> None:
        self.graph: Graph = match.graph
        self.match = match
        self.pass_name = pass_name
        self.staged: list[fx.Node] = []
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.removed: list[fx.Node] = []
        self.proved: set[fx.Node] = set()
        self._from = provenance.merge(match.root, match.nodes)
        self._anchor = match.nodes[0]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Stage a call; returns its node, whose ``meta["val"]`` is inferred.

        Raises:
            PassError: an argument is a symbolic size that no node of the graph computes, or the op writes to
                its input.
        """
        given = [
            item for item in _flatten((args, kwargs)) if isinstance(item, (torch.SymInt, torch.SymFloat))
        ]
        if given:
            raise PassError(
                f"{self.pass_name} gave {target} the symbolic size {given[0]}, which is not a node"
            )
        self._advance(item for item in _flatten((args, kwargs)) if isinstance(item, fx.Node))
        with self.graph.fx.inserting_after(self._anchor):
            node = self._stage(self.graph.call(target, args, kwargs, self._from))
        if writes_in_place(node):
            raise PassError(f"{self.pass_name} called {target}, which writes to its input")
        return node

    def constant(self, tensor: torch.Tensor, made_from: Iterable[fx.Node], how: str) -> fx.Node:
        """Stage a constant that is computed now, from other constants.

        Args:
            tensor: its value.
            made_from: the constant nodes it derives from; their names are recorded.
            how: the derivation, in words.
        """
        constants = self.graph.constants
        sources = [name for node in made_from for name in constants[str(node.target)].sources]
        name = self.graph.add_constant(tensor, sources, how)
        with self.graph.fx.inserting_before(next(iter(self.graph.fx.nodes))):
            node = self.graph.get_constant(name, self._from)
        return self._stage(node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` serve the users of ``old``, once the rewrite is verified.

        Raises:
            PassError: dtype or shape would change.
        """
        before, after = old.meta["val"], new.meta["val"]
        if isinstance(before, torch.Tensor) and (
            before.dtype != after.dtype or not same_shape(before.shape, after.shape)
        ):
            raise PassError(
                f"{self.pass_name} would turn {before.dtype} {list(before.shape)} at {old.name}"
                f" into {after.dtype} {list(after.shape)}"
            )
        self.replaced[old] = new

    def remove(self, node: fx.Node, *, proved: bool = False) -> None:
        """Erase a node that nobody reads, once the rewrite is verified.

        Args:
            node: it stays where it has an effect, unless that is proved to be none.
            proved: the node is an assertion, and the pass has proved that it holds at every call.
        """
        self.removed.append(node)
        if proved:
            self.proved.add(node)

    def commit(self) -> None:
        """Wire the staged nodes in and erase what they replace."""
        for old, new in self.replaced.items():
            users = [user for user in old.users if user not in self.staged]
            for user in users:
                user.replace_input_with(old, new)
        if self._out_of_order():
            self.graph.sort()
        self.graph.erase_dead(self.removed, self.proved)
        self.graph.erase_dead(reversed([n for n in self.match.nodes if not n._erased]))
        self.graph.erase_dead([n for n in reversed(self.staged) if not n._erased])

    def revert(self) -> None:
        """Erase everything staged; the graph is as it was."""
        for node in reversed(self.staged):
            self.graph.fx.erase_node(node)
        self.staged.clear()
        self.replaced.clear()

    def _stage(self, node: fx.Node) -> fx.Node:
        self.staged.append(node)
        return node

    def _advance(self, sources: Iterable[fx.Node]) -> None:
        """Move the insertion point behind everything that the next call reads."""
        for source in sources:
            if self._anchor < source:
                self._anchor = source
        if self.staged and self._anchor < self.staged[-1]:
            self._anchor = self.staged[-1]

    def _out_of_order(self) -> bool:
        return any(user < new for new in self.replaced.values() for user in new.users)


def _flatten(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flatten(item)
    else:
        yield value
