"""Keeping only some of a model's outputs, or only the last position of one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.errors import InputError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph

aten = torch.ops.aten
Outputs = Iterable[str] | Mapping[str, str | None] | None
_LAST = "last"
_Path = tuple[str, ...]
_Way = str | None  # _LAST, or None for all of it


@dataclass(frozen=True)
class Selection:
    """Which parts of an output stay.

    Args:
        ways: by the path of an output in the model's containers: ``"last"``, or None for all of it.
    """

    ways: Mapping[_Path, _Way]

    def apply(self, output: Any) -> Any:
        """The same selection of a real output: what was not selected is None."""
        leaves, spec = pytree.tree_flatten(output)
        pairs, kept = _prune(spec, iter(leaves), self.ways)
        return pytree.tree_unflatten([leaf[:, -1:] if way else leaf for leaf, way in pairs], kept)


def select(graph: Graph, wanted: Outputs) -> Selection | None:
    """Change a graph to return only some outputs, in place; what only the others need is then dead.

    Args:
        graph: as captured.
        wanted: names of outputs, as the model's output has them (``"logits"``, ``"past_key_values"``, ``"0"``
            for the first of a tuple, dots for what lies deeper); or a mapping from names to ``"last"`` (keep
            the last position of dimension 1, which stays as a dimension of size 1) or None (all of it). None
            keeps everything.

    Returns:
        What was selected; None when everything was kept.

    Raises:
        InputError: a name or a selection is unknown, or an output has no dimension 1.
    """
    if wanted is None:
        return None
    if isinstance(wanted, str):
        raise InputError(f"outputs={wanted!r} is a string", hint=f"a list of names: outputs=[{wanted!r}]")
    named = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted)
    ways: dict[_Path, _Way] = {}
    known = list(_paths(graph.out_spec))
    for name, way in named.items():
        if way not in (None, _LAST):
            raise InputError(
                f"outputs={{{name!r}: {way!r}}} is unknown", hint="'last', or None for all of it"
            )
        path = tuple(str(name).split("."))
        if path not in known:
            raise _unknown(name, [".".join(other) for other in known if other])
        ways[path] = way
    if not ways:
        raise InputError("outputs names none", hint="None keeps all of them")
    pairs, graph.out_spec = _prune(graph.out_spec, iter(graph.output.args[0]), ways)  # type: ignore[arg-type]
    graph.output.args = (tuple(_selected(graph, result, way) for result, way in pairs),)
    graph.module.recompile()
    return Selection(ways)


def _unknown(name: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
    top = [other for other in known if "." not in other]
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(top) or 'one, without a name'}"
    )
    return InputError(f"the model has no output {name!r}", where="outputs", hint=hint)


def children(spec: pytree.TreeSpec) -> Iterator[tuple[str, pytree.TreeSpec]]:
    """The parts of a container with their names: keys, field names, or positions."""
    children = spec.children()
    names = getattr(spec.context, "_fields", spec.context)  # of a named tuple the context is its type
    if isinstance(names, list) and names and isinstance(names[0], list):
        names = names[0]  # a dataclass: the fields that are set, and those that are None
    if not isinstance(names, (list, tuple)) or len(names) != len(children):
        names = range(len(children))
    return zip(map(str, names), children, strict=True)


def _paths(spec: pytree.TreeSpec, path: _Path = ()) -> Iterator[_Path]:
    yield path
    if not spec.is_leaf():
        for name, child in children(spec):
            yield from _paths(child, (*path, name))


def _prune(
    spec: pytree.TreeSpec,
    leaves: Iterator[Any],
    ways: Mapping[_Path, _Way],
    path: _Path = (),
) -> tuple[list[tuple[Any, _Way]], pytree.TreeSpec]:
    """The leaves that stay, each with what to do to it, in containers where the others are None."""
    own = list(_take(leaves, spec.num_leaves))
    if path in ways:
        return [(leaf, ways[path]) for leaf in own], spec
    if not any(way[: len(path)] == path for way in ways):
        return [(None, None)], pytree.tree_structure(None)
    pairs: list[tuple[Any, _Way]] = []
    specs = []
    rest = iter(own)
    for name, child in children(spec):
        found, kept = _prune(child, rest, ways, (*path, name))
        pairs += found
        specs.append(kept)
    return pairs, pytree.TreeSpec(spec.type, spec.context, specs)


def _take(leaves: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        yield next(leaves)


def _selected(graph: Graph, result: Any, way: _Way) -> Any:
    if way is None or not isinstance(result, fx.Node):
        return result
    value = result.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        raise InputError(f"the output {result.name} has no positions", hint="None keeps all of it")
    with graph.fx.inserting_before(graph.output):
        return graph.call(aten.slice.Tensor, (result, 1, -1, 2**63 - 1), {}, provenance.of(result))
