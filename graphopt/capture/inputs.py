"""The user's inputs: flattened, named, checked, and made fit for capture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.capture.containers import flatten, known_containers
from graphopt.errors import InputError
from graphopt.ir.graph import InputSpec

Dynamic = bool | Mapping[str, Mapping[int, str]] | None
Call = tuple[tuple[Any, ...], dict[str, Any]]

_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), slice, Enum)
_BAKED = (*_PLAIN, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


@dataclass(frozen=True)
class Leaf:
    """One leaf of the inputs.

    Args:
        path: where it sits in the call, as a user would write it: ``input_ids``, ``pair['left'][0]``.
        argument: the argument of ``forward`` that it is part of.
        source: how ``torch.export`` names it in its guards: ``L['input_ids']``.
        value: a tensor, or a value that capture bakes in.
    """

    path: str
    argument: str
    source: str
    value: Any


def leaves(forward: Callable[..., Any], call: Call) -> list[Leaf]:
    """The leaves of ``(args, kwargs)`` in flattening order."""
    args, kwargs = call
    parameters = inspect.signature(forward).parameters.values()
    names = [(p.name, f"L[{p.name!r}]") for p in parameters if p.kind in _POSITIONAL][: len(args)]
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), "args")
    names += [(f"{rest}[{i}]", f"L[{rest!r}][{i}]") for i in range(len(args) - len(names))]
    more = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), "")
    known = {p.name for p in parameters}
    keywords = {name: f"L[{name!r}]" if name in known else f"L[{more!r}][{name!r}]" for name in kwargs}
    found = []
    flat: Any = pytree.tree_flatten_with_path(call)[0]
    for (place, first, *keys), value in flat:
        name, source = names[first.idx] if place.idx == 0 else (str(first.key), keywords[first.key])
        inner = pytree.keystr(tuple(keys))
        found.append(Leaf(name + inner, name, source + inner, value))
    return found


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def checked_call(model: torch.nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Call:
    """The example inputs, fit for capture: a call that the model can take, on its device.

    A tensor object that occurs twice is cloned at its second place: ``torch.export`` keys placeholders by
    object identity, and the captured graph would ignore the second input of every later call.

    Raises:
        InputError: nothing was given, an input is on another device than the model, or is neither a tensor
            nor a plain value nor a known container of them.
    """
    name = type(model).__name__
    args, kwargs = tuple(args), dict(kwargs)
    signature = inspect.signature(model.forward)
    if not args and not kwargs:
        expected = [p for p in signature.parameters if p not in ("args", "kwargs")]
        raise InputError(
            f"no example inputs were given for {name}",
            where=f"{name}.forward({', '.join(expected[:6])}{', ...' if len(expected) > 6 else ''})",
            hint="pass them as torch.export.export takes them: optimize(model, (x,), {'mask': mask})",
        )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {name}.forward: {error}", where=f"{name}.forward{signature}"
        ) from None
    known_containers()
    flat, spec = flatten((args, kwargs))
    _check_leaves(name, leaves(model.forward, (args, kwargs)), _home(model))
    call: Call = pytree.tree_unflatten(_separate(flat), spec)
    return call


def _home(model: torch.nn.Module) -> torch.device | None:
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(homes) > 1:
        raise InputError(
            f"{type(model).__name__} is spread over several devices: {', '.join(sorted(map(str, homes)))}",
            hint="move it to one device with model.to(...)",
        )
    return next(iter(homes), None)


def _check_leaves(name: str, given: Sequence[Leaf], home: torch.device | None) -> None:
    tensors = [leaf for leaf in given if isinstance(leaf.value, torch.Tensor)]
    for leaf in given:
        if not isinstance(leaf.value, (torch.Tensor, *_BAKED)):
            raise InputError(
                f"input {leaf.path} is a {type(leaf.value).__name__}: neither a tensor nor a plain value",
                where=leaf.path,
                hint="make it a torch.Tensor, or register its class with torch.export.register_dataclass"
                " or torch.utils._pytree.register_pytree_node",
            )
    if not tensors:
        raise InputError(
            f"no tensor is among the example inputs of {name}",
            hint="what is not a tensor is captured as it is: nothing would be left to vary",
        )
    home = home or tensors[0].value.device
    for leaf in tensors:
        if leaf.value.device != home:
            there = leaf.value.device
            raise InputError(
                f"input {leaf.path} is on {there}, and {name} is on {home}",
                where=leaf.path,
                hint=f"move the input with .to({str(home)!r}), or the model with .to({str(there)!r})",
            )


def _separate(flat: Iterable[Any]) -> list[Any]:
    seen: set[int] = set()
    separated = []
    for leaf in flat:
        twice = isinstance(leaf, torch.Tensor) and id(leaf) in seen
        separated.append(leaf.clone() if twice else leaf)
        seen.add(id(leaf))
    return separated


class DynamicDims:
    """Which dimensions of which inputs are dynamic, and what the user calls them.

    Args:
        dynamic: True to infer them, or ``{"input_ids": {0: "batch", 1: "seq"}}`` by the name of an argument
            of ``forward`` or the path of one leaf in it. Dimensions of one name are equal.
        given: the leaves of the example inputs.

    Raises:
        InputError: a name is not an input, a dimension does not exist, or sizes of one name differ.
    """

    def __init__(self, dynamic: Dynamic, given: Sequence[Leaf]) -> None:
        if not isinstance(dynamic, (bool, Mapping, type(None))):
            raise InputError(f"dynamic is {dynamic!r}", hint=_HINT)
        self.inferred = dynamic is True
        self._tensors = [leaf for leaf in given if isinstance(leaf.value, torch.Tensor)]
        self._labels: dict[str, dict[int, str]] = {leaf.path: {} for leaf in self._tensors}
        for name, dims in (dynamic or {}).items() if isinstance(dynamic, Mapping) else ():
            self._declare(name, dims, given)
        self._check_equal()

    def _declare(self, name: str, dims: Mapping[int, str], given: Sequence[Leaf]) -> None:
        where = f"dynamic={{{name!r}: {dims!r}}}"
        if not isinstance(dims, Mapping) or not all(isinstance(label, str) for label in dims.values()):
            raise InputError(f"dynamic maps {name!r} to {dims!r}", where=where, hint=_HINT)
        if not any(name in (leaf.path, leaf.argument) for leaf in given):
            raise InputError(
                f"dynamic names the input {name!r}, which is not among the example inputs",
                where=where,
                hint=f"name one of: {', '.join(dict.fromkeys(leaf.argument for leaf in given))}",
            )
        named = [leaf for leaf in self._tensors if name in (leaf.path, leaf.argument)]
        rank = min((leaf.value.dim() for leaf in named), default=0)
        for dim, label in dims.items():
            if dim not in range(rank):
                raise InputError(
                    f"dynamic names dimension {dim} of {name!r}, which has {rank} dimensions", where=where
                )
            for leaf in named:
                self._labels[leaf.path][dim] = label

    def _check_equal(self) -> None:
        first: dict[str, tuple[int, str]] = {}
        for leaf in self._tensors:
            for dim, label in self.labels(leaf.path).items():
                size = leaf.value.shape[dim]
                wanted, other = first.setdefault(label, (size, leaf.path))
                if size != wanted:
                    raise InputError(
                        f"dimension {label!r} is {wanted} in the example {other} and {size} in {leaf.path}",
                        where=leaf.path,
                        hint="give different sizes different names",
                    )

    def labels(self, path: str) -> dict[int, str]:
        """The user's names of the dynamic dimensions of the leaf at a path."""
        return self._labels.get(path, {})

    def export_spec(self) -> Any:
        """The ``dynamic_shapes`` argument of ``torch.export.export`` for a function of ``*tensors``."""
        if self.inferred:
            auto = torch.export.Dim.AUTO
            return (tuple(dict.fromkeys(range(leaf.value.dim()), auto) for leaf in self._tensors),)
        dynamic = torch.export.Dim.DYNAMIC
        return (tuple(dict.fromkeys(self.labels(leaf.path), dynamic) for leaf in self._tensors),)

    def widened(self) -> tuple[torch.Tensor, ...]:
        """The example tensors, dynamic dimensions of size 1 doubled: export would specialize them to 1."""
        tensors = [leaf.value for leaf in self._tensors]
        if self.inferred and all(t.dim() and t.shape[0] == 1 for t in tensors):
            return tuple(tensor.repeat_interleave(2, dim=0) for tensor in tensors)
        for index, leaf in enumerate(self._tensors):
            for dim in self.labels(leaf.path):
                if leaf.value.shape[dim] == 1:
                    tensors[index] = tensors[index].repeat_interleave(2, dim=dim)
        return tuple(tensors)

    def declare_equal(self, tensors: Sequence[torch.Tensor]) -> None:
        """Tell capture, from inside, that dimensions of one name are equal."""
        first: dict[str, Any] = {}
        for leaf, tensor in zip(self._tensors, tensors, strict=True):
            for dim, label in self.labels(leaf.path).items():
                torch._check(first.setdefault(label, tensor.shape[dim]) == tensor.shape[dim])


_HINT = "dynamic is True, or names dimensions: dynamic={'input_ids': {0: 'batch', 1: 'seq'}}"


def input_specs(
    given: Sequence[Leaf], placeholders: Iterable[torch.fx.Node], dims: DynamicDims
) -> tuple[InputSpec, ...]:
    """A spec per leaf, from the captured placeholders of its tensors in the same order."""
    nodes = iter(placeholders)
    specs = []
    for leaf in given:
        if isinstance(leaf.value, torch.Tensor):
            node = next(nodes)
            val = node.meta["val"]
            labels = dict(dims.labels(leaf.path))
            specs.append(InputSpec(leaf.path, node.name, tuple(val.shape), val.dtype, val.device, labels))
        else:
            specs.append(InputSpec(leaf.path, None, constant=leaf.value))
    return tuple(specs)


def example_tensors(specs: Sequence[InputSpec], example: Any) -> list[torch.Tensor]:
    """The flat tensor inputs of an example call, in placeholder order."""
    found = pytree.tree_leaves(example)
    return [leaf for spec, leaf in zip(specs, found, strict=True) if spec.node is not None]
