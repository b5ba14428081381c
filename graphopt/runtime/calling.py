"""The calling convention: a call's arguments as flat tensors, checked against what was captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.graph import Graph, InputSpec
from graphopt.runtime.structure import builder


class CallingConvention:
    """How a captured model is called.

    Args:
        graph: as captured: its input specs, containers and guards.
        forward: the original's ``forward``, whose signature tells which spellings of a call are the same.
    """

    def __init__(self, graph: Graph, forward: Callable[..., Any]) -> None:
        self._inputs = graph.inputs
        self._in_spec = graph.in_spec
        self._guards = graph.guards
        self._signature = inspect.signature(forward)
        self._unflatten = builder(graph.out_spec)
        example_args, example_kwargs = pytree.tree_unflatten(list(graph.inputs), self._in_spec)
        self._spelling = (len(example_args), tuple(example_kwargs))
        self._held: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The flat tensors of a call, in placeholder order.

        Raises:
            InputError: the call has other inputs, dtypes, ranks, devices or sizes than were captured.
        """
        given = (*args, *kwargs.values())
        key = _key(args, kwargs, given)
        places = None if key is None else self._held.get(key)
        if places is not None:  # 50 us of checks: a quarter of a small model's time on a GPU
            return [given[place] for place in places]
        tensors = self._checked(args, kwargs)
        if key is not None and len(self._held) < _REMEMBERED:
            places = self._places(args, kwargs, tensors)
            if places is not None:
                self._held[key] = places
        return tensors

    def _places(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]
    ) -> tuple[int, ...] | None:
        """Where the flat tensors stand in a call without containers; None where that cannot be told."""
        alike = (len(args), tuple(kwargs)) == self._spelling
        if alike and len(args) + len(kwargs) == len(self._inputs):
            return tuple(place for place, spec in enumerate(self._inputs) if spec.node is not None)
        given = [*args, *kwargs.values()]
        places = {id(leaf): place for place, leaf in enumerate(given) if isinstance(leaf, torch.Tensor)}
        count = sum(isinstance(leaf, torch.Tensor) for leaf in given)
        if len(places) != count or count != len(tensors):
            return None  # one tensor in two places, or one that is left out
        return tuple(places[id(tensor)] for tensor in tensors)

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._in_spec:
            leaves = self._rearranged(args, kwargs)
        tensors = []
        for expected, leaf in zip(self._inputs, leaves, strict=True):
            _check_leaf(expected, leaf)
            if expected.node is not None:
                tensors.append(leaf)
        self._check_names(leaves)
        self.check_relations(tensors)
        return tensors

    def check_relations(self, tensors: Sequence[torch.Tensor]) -> None:
        """Check the relations between sizes of flat tensors that fit the captured inputs one by one.

        Raises:
            InputError: one does not hold.
        """
        if self._guards is None:
            return
        try:
            self._guards(*tensors)
        except AssertionError as error:
            raise InputError(
                f"the inputs break a relation that the model was captured under: {error}",
                hint="optimize again with example inputs like these",
            ) from None

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The original's output type around flat outputs."""
        return self._unflatten(outputs)

    def _rearranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call that spells the captured one differently: by name, or in another order."""
        example_args, example_kwargs = pytree.tree_unflatten(list(self._inputs), self._in_spec)
        try:
            given = self._signature.bind(*args, **kwargs).arguments
            wanted = self._signature.bind(*example_args, **example_kwargs).arguments
        except TypeError as error:
            raise InputError(f"the call does not fit the model's forward: {error}") from None
        extra = [name for name in given if name not in wanted and not self._is_default(name, given[name])]
        missing = [name for name in wanted if name not in given]
        if extra or missing:
            what = [f"{name!r} was not captured" for name in extra]
            what += [f"{name!r} is missing" for name in missing]
            raise InputError(
                f"other inputs than the model was optimized for: {', '.join(what)}",
                hint="optimize with example inputs for every input that you will pass",
            )
        leaves: list[Any] = []
        for name in wanted:
            found, expected = pytree.tree_flatten(given[name]), pytree.tree_flatten(wanted[name])
            if found[1] != expected[1]:
                raise InputError(f"input {name!r} has another structure than the one captured", where=name)
            leaves += [(leaf, spec) for leaf, spec in zip(found[0], expected[0], strict=True)]
        by_spec = {id(spec): leaf for leaf, spec in leaves}
        return [by_spec[id(spec)] for spec in self._inputs]

    def _is_default(self, name: str, value: Any) -> bool:
        default = self._signature.parameters[name].default
        return value is default or (not isinstance(value, torch.Tensor) and value in (None, (), {}))

    def _check_names(self, leaves: Sequence[Any]) -> None:
        """Dimensions of one name must be equal."""
        sizes: dict[str, tuple[int, str]] = {}
        for spec, leaf in zip(self._inputs, leaves, strict=True):
            for dim, name in spec.dims.items():
                size, first = sizes.setdefault(name, (leaf.shape[dim], spec.path))
                if leaf.shape[dim] != size:
                    raise InputError(
                        f"dimension {name!r} is {size} in {first} and {leaf.shape[dim]} in {spec.path}",
                        where=spec.path,
                    )


_REMEMBERED = 1024  # combinations of spellings and shapes that have passed every check
_PLAIN = frozenset({bool, int, float, str, type(None)})


def _key(args: tuple[Any, ...], kwargs: dict[str, Any], given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the checks look at; None of a call with containers, or with tensors of a kind of their own."""
    key: list[Any] = [len(args), *kwargs]
    for leaf in given:
        kind = type(leaf)
        if kind is torch.Tensor:
            key += (leaf.shape, leaf.dtype, leaf.device)
        elif kind in _PLAIN:
            key += (kind, leaf)
        else:
            return None
    return tuple(key)


def _check_leaf(expected: InputSpec, leaf: Any) -> None:
    """One leaf against its spec: kind, dtype, device, rank and fixed sizes."""
    if expected.node is None:
        if type(leaf) is not type(expected.constant) or leaf != expected.constant:
            raise InputError(
                f"input {expected.path} is {leaf!r}; the model was optimized for {expected.constant!r}",
                where=expected.path,
                hint="values that are not tensors are part of the graph: optimize again with this one",
            )
        return
    if not isinstance(leaf, torch.Tensor):
        raise InputError(f"input {expected.path} is {type(leaf).__name__}, not a tensor", where=expected.path)
    for what, got, want in (
        ("dtype", leaf.dtype, expected.dtype),
        ("device", leaf.device, expected.device),
        ("rank", leaf.dim(), len(expected.shape)),
    ):
        if got != want:
            raise InputError(
                f"input {expected.path} has {what} {got}; the model was optimized for {want}",
                where=expected.path,
                hint="convert the input, or optimize again with example inputs like it",
            )
    for dim, (size, fixed) in enumerate(zip(leaf.shape, expected.shape, strict=True)):
        if isinstance(fixed, int) and size != fixed:
            raise InputError(
                f"input {expected.path} has size {size} in dimension {dim};"
                f" the model was optimized for {fixed}",
                where=expected.path,
                hint=f"declare the dimension dynamic: dynamic={{{expected.path!r}: {{{dim}: 'name'}}}}",
            )
