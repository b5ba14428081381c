"""The model's output around flat values: how it is built is found out once, not at every call."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch.utils._pytree as pytree

Build = Callable[[Sequence[Any]], Any]


def builder(spec: pytree.TreeSpec) -> Build:
    """What ``pytree.tree_unflatten`` does, for one spec.

    What it returns raises ValueError where there are more or fewer values than the spec has leaves.
    """
    count, build = spec.num_leaves, _node(spec, 0)

    def checked(values: Sequence[Any]) -> Any:
        if len(values) != count:
            raise ValueError(f"{len(values)} values do not fill a structure of {count}")
        return build(values)

    return checked


def _node(spec: pytree.TreeSpec, first: int) -> Build:
    """Builds a part of the structure, whose leaves begin at a place among all values."""
    if spec.is_leaf():
        return itemgetter(first)
    parts: list[Build] = []
    for child in spec.children():
        parts.append(_node(child, first))
        first += child.num_leaves
    kind, context = spec.type, spec.context
    if kind is tuple:
        return lambda values: tuple([part(values) for part in parts])
    if kind is list:
        return lambda values: [part(values) for part in parts]
    if kind is dict:
        return lambda values: {key: part(values) for key, part in zip(context, parts, strict=True)}
    unflatten = pytree.SUPPORTED_NODES[kind].unflatten_fn
    if _is_model_output(kind):
        stamp = _Stamp(kind, context, unflatten)
        return lambda values: stamp([part(values) for part in parts])
    return lambda values: unflatten([part(values) for part in parts], context)


def _is_model_output(kind: Any) -> bool:
    """Whether it is one of transformers' own, and sets its fields as they all do."""
    base = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", None)
    if base is None or not isinstance(kind, type) or not issubclass(kind, base):
        return False
    if not kind.__module__.startswith("transformers."):
        return False
    own = "__post_init__", "__setattr__", "__setitem__"
    return all(getattr(kind, name) is getattr(base, name) for name in own)


class _Stamp:
    """Makes outputs of transformers' ``ModelOutput`` by copying the first one with other values.

    Its constructor lists all fields for each one that it sets: 13.7 us for an encoder's two of six, which a
    copy makes in 1.9. The first output is made by it, and must turn out to hold the values under their names,
    None for all other fields, and nothing else.

    Args:
        kind: the class.
        names: of the values.
        unflatten: the registered way of making one.
    """

    def __init__(
        self, kind: type[OrderedDict[str, Any]], names: Sequence[str], unflatten: Callable[..., Any]
    ) -> None:
        self._kind, self._names, self._unflatten = kind, list(names), unflatten
        self._kinds: list[type] = []
        self._fields: dict[str, None] | None = None

    def __call__(self, values: Sequence[Any]) -> Any:
        fields = self._fields
        if fields is None or [type(value) for value in values] != self._kinds:
            made = self._unflatten(values, self._names)
            if fields is None and self._is_plain(made, values):
                self._kinds, self._fields = [type(value) for value in values], dict.fromkeys(vars(made))
            return made
        made = self._kind.__new__(self._kind)
        state = made.__dict__
        state.update(fields)
        for name, value in zip(self._names, values, strict=True):
            OrderedDict.__setitem__(made, name, value)
            state[name] = value
        return made

    def _is_plain(self, made: OrderedDict[str, Any], values: Sequence[Any]) -> bool:
        """Whether an output is its values under their names and no more."""
        given = dict(zip(self._names, values, strict=True))
        state = vars(made)
        held = list(made.keys()) == self._names and all(value is given[name] for name, value in made.items())
        return (
            held
            and given.keys() <= state.keys()
            and all(value is given.get(name) for name, value in state.items())
        )
