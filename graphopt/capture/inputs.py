"""The user's inputs: flattened, named, checked, and made fit for capture."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphopt.errors import InputError
from graphopt.ir.graph import InputSpec

Dynamic = bool | Mapping[str, Mapping[int, str]] | None


def require_inputs(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call without inputs, naming what the model's ``forward`` expects.

    Raises:
        InputError: neither positional nor keyword inputs were given, or one of them is not on the device of
            the model.
    """
    name = type(model).__name__
    if not args and not kwargs:
        expected = [p for p in inspect.signature(model.forward).parameters if p not in ("args", "kwargs")]
        raise InputError(
            f"no example inputs were given for {name}",
            where=f"{name}.forward({', '.join(expected[:6])}{', ...' if len(expected) > 6 else ''})",
            hint="pass them as torch.export.export takes them: optimize(model, (x,), {'mask': mask})",
        )
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(homes) > 1:
        raise InputError(
            f"{name} is spread over several devices: {', '.join(sorted(map(str, homes)))}",
            hint="move it to one device with model.to(...)",
        )
    for path, leaf in leaves((args, dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and homes and leaf.device not in homes:
            home = next(iter(homes))
            raise InputError(
                f"input {path} is on {leaf.device}, and {name} is on {home}",
                where=path,
                hint=f"move the input with .to({str(home)!r}), or the model with .to({str(leaf.device)!r})",
            )


def leaves(call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, Any]]:
    """The leaves of ``(args, kwargs)`` in flattening order, each with its path as a user would write it."""
    flat, _ = pytree.tree_flatten_with_path(call)
    return [(_path(keys), leaf) for keys, leaf in flat]


def _path(keys: tuple[Any, ...]) -> str:
    place, *rest = keys
    if place.idx == 0:
        return "args" + pytree.keystr(tuple(rest))
    return str(rest[0].key) + pytree.keystr(tuple(rest[1:]))


def forward_names(model: torch.nn.Module, args: tuple[Any, ...]) -> list[str]:
    """The names that ``forward`` gives to the positional arguments."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(len(args) - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[: len(args)]


def separate(value: Any) -> Any:
    """The same inputs, with a tensor object that occurs twice cloned at its second place.

    ``torch.export`` keys placeholders by object identity: one tensor given twice becomes one placeholder that
    serves both, and the captured graph then ignores the second input of every later call.
    """
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in seen:
                return leaf.clone()
            seen.add(id(leaf))
        return leaf

    return pytree.tree_map(once, value)


class DynamicDims:
    """Which dimensions of which input leaves are dynamic, and what the user calls them.

    Args:
        dynamic: True, or ``{"input_ids": {0: "batch", 1: "seq"}}`` by the name of a ``forward`` argument.
        model: the model whose ``forward`` names positional arguments.
        args: example positional inputs.
        kwargs: example keyword inputs.

    Raises:
        InputError: a name is not an input, or a dimension does not exist.
    """

    def __init__(
        self, dynamic: Dynamic, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.inferred = dynamic is True
        self.named: dict[str, Mapping[int, str]] = dict(dynamic) if isinstance(dynamic, Mapping) else {}
        self._positional = forward_names(model, args)
        values = {**dict(zip(self._positional, args, strict=True)), **kwargs}
        for name, dims in self.named.items():
            if name not in values:
                raise InputError(
                    f"dynamic names the input {name!r}, which is not among the example inputs",
                    where=f"dynamic={{{name!r}: ...}}",
                    hint=f"name one of: {', '.join(values)}",
                )
            ranks = [
                leaf.dim() for leaf in pytree.tree_leaves(values[name]) if isinstance(leaf, torch.Tensor)
            ]
            for dim in dims:
                if not ranks or not 0 <= dim < min(ranks):
                    raise InputError(
                        f"dynamic names dimension {dim} of {name!r}, which has {min(ranks, default=0)} dimensions",
                        where=f"dynamic={{{name!r}: {{{dim}: {dims[dim]!r}}}}}",
                    )

    def __bool__(self) -> bool:
        return self.inferred or bool(self.named)

    def of_argument(self, name: str) -> Mapping[int, str]:
        """The named dynamic dimensions of one argument of ``forward``."""
        return self.named.get(name, {})

    def export_spec(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The ``dynamic_shapes`` argument of ``torch.export.export``."""
        if not self:
            return None
        hint = torch.export.Dim.AUTO if self.inferred else torch.export.Dim.DYNAMIC

        def leaf_spec(leaf: Any, dims: Mapping[int, str]) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return None
            chosen = range(leaf.dim()) if self.inferred else dims
            return dict.fromkeys(chosen, hint)

        def spec(name: str, argument: Any) -> Any:
            return pytree.tree_map(lambda leaf: leaf_spec(leaf, self.of_argument(name)), argument)

        positional = tuple(spec(n, a) for n, a in zip(self._positional, args, strict=True))
        return positional, {name: spec(name, argument) for name, argument in kwargs.items()}

    def widened(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs with dynamic dimensions of size 1 doubled: export would specialise them to 1."""

        def widen(leaf: Any, dims: Mapping[int, str]) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            for dim in (0,) if self.inferred and leaf.dim() else dims:
                if leaf.shape[dim] == 1 and dim in self._ones:
                    leaf = leaf.repeat_interleave(2, dim=dim)
            return leaf

        pairs = [*zip(self._positional, args, strict=True), *kwargs.items()]
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        batch_of_one = self.inferred and all(t.dim() and t.shape[0] == 1 for t in tensors)
        self._ones = {0} if batch_of_one else {d for dims in self.named.values() for d in dims}
        widened = [
            pytree.tree_map(lambda leaf, n=name: widen(leaf, self.of_argument(n)), argument)
            for name, argument in pairs
        ]
        keywords = dict(zip(kwargs, widened[len(args) :], strict=True))
        return tuple(widened[: len(args)]), keywords

    def equalities(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[torch.SymInt, torch.SymInt]]:
        """Pairs of sizes that carry the same name, so that capture may rely on their being equal."""
        first: dict[str, Any] = {}
        pairs = []
        for name, argument in [*zip(self._positional, args, strict=True), *kwargs.items()]:
            for leaf in pytree.tree_leaves(argument):
                if isinstance(leaf, torch.Tensor):
                    for dim, label in self.of_argument(name).items():
                        size = leaf.shape[dim]
                        pairs.append((first.setdefault(label, size), size))
        return pairs

    def labels(self, path: str) -> dict[int, str]:
        """The user's names of the dynamic dimensions of the leaf at a path."""
        head = path.split("[")[0] if not path.startswith("args[") else ""
        if not head:
            index = int(path[5 : path.index("]")])
            head = self._positional[index]
        return dict(self.of_argument(head))


def input_specs(
    call: tuple[tuple[Any, ...], dict[str, Any]], placeholders: list[torch.fx.Node], dims: DynamicDims
) -> tuple[InputSpec, ...]:
    """A spec per leaf, from the captured placeholders in the same order."""
    specs = []
    for (path, leaf), node in zip(leaves(call), placeholders, strict=True):
        if isinstance(leaf, torch.Tensor):
            val = node.meta["val"]
            specs.append(
                InputSpec(path, node.name, tuple(val.shape), val.dtype, val.device, dims.labels(path))
            )
        else:
            specs.append(InputSpec(path, None, constant=copy.copy(leaf)))
    return tuple(specs)
