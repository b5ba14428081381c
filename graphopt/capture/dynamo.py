"""A piece of a model as TorchDynamo hands it to a backend, as a module that can be captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.capture.inputs import Dynamic

_STATIC = "_dynamo_static_input_type"  # Dynamo's mark on parameters and buffers among a piece's inputs


class DynamoPiece:
    """What the inputs of a piece are: its weights, its tensors, and numbers.

    Dynamo passes weights at every call like any other input, and one compiled piece may serve several layers,
    each with its own weights. Sizes that vary are passed as integers besides the tensors that have them.

    Args:
        module: from Dynamo, its placeholders with their example values.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._static: list[int] = []
        self._tensors: list[int] = []
        self._sizes: dict[int, tuple[int, int]] = {}
        self._numbers: list[int] = []
        self._dims: list[dict[int, str]] = []
        places: dict[str, tuple[int, int]] = {}
        numbers: dict[int, str] = {}
        for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
            example = node.meta.get("example_value")
            if not isinstance(example, torch.Tensor):
                numbers[index] = _symbol(example)
            elif _STATIC in node.meta.get("tensor_dict", {}):
                self._static.append(index)
            else:
                dims = {dim: _symbol(size) for dim, size in enumerate(example.shape)}
                dims = {dim: name for dim, name in dims.items() if name}
                for dim, name in dims.items():
                    places.setdefault(name, (len(self._tensors), dim))
                self._tensors.append(index)
                self._dims.append(dims)
        for index, name in numbers.items():
            if name in places:
                self._sizes[index] = places[name]
            else:
                self._numbers.append(index)

    @property
    def dynamic(self) -> Dynamic:
        """The dynamic dimensions by the names that ``bound``'s inputs have."""
        return {f"tensors[{index}]": dims for index, dims in enumerate(self._dims) if dims} or None

    def tensors(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Those of a call's inputs that are neither weights nor numbers."""
        return tuple(args[index] for index in self._tensors)

    def weights(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The weights that a call passes."""
        return tuple(args[index] for index in self._static)

    def key(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What two calls share that one captured graph serves: weights by identity, and numbers by value."""
        return (*(id(args[index]) for index in self._static), *(args[index] for index in self._numbers))

    def bound(self, args: Sequence[Any]) -> torch.nn.Module:
        """The piece as a module of its tensors; the weights and numbers of a call are part of it."""
        return _Bound(self.module, args, self._static, self._tensors, self._sizes)


class _Bound(torch.nn.Module):
    """A piece with its weights. They are the caller's own tensors, by the piece's names for them."""

    def __init__(
        self,
        piece: fx.GraphModule,
        args: Sequence[Any],
        static: Sequence[int],
        tensors: Sequence[int],
        sizes: dict[int, tuple[int, int]],
    ) -> None:
        super().__init__()
        self.piece = piece
        self._given = [None if isinstance(value, torch.Tensor) else value for value in args]
        self._tensors, self._sizes = tensors, sizes
        names = [node.name for node in piece.graph.find_nodes(op="placeholder")]
        self._names = {index: names[index] for index in static}
        for index, name in self._names.items():
            self.register_buffer(name, args[index].detach(), persistent=False)
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Run the piece."""
        args = list(self._given)
        for index, name in self._names.items():
            args[index] = getattr(self, name)
        for index, tensor in zip(self._tensors, tensors, strict=True):
            args[index] = tensor
        for index, (tensor_index, dim) in self._sizes.items():
            args[index] = tensors[tensor_index].shape[dim]
        return tuple(self.piece(*args))


def _symbol(size: Any) -> str:
    """The name of a size that varies by itself; "" for a number, and for what is computed from others."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
        return str(size.node.expr)
    return ""
