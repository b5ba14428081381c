"""``torch.compile(model, backend="graphopt")``: every piece between graph breaks is optimized on its own.

It is for inference: under ``torch.no_grad`` or ``torch.inference_mode``. The first call of a piece runs it as
it is and optimizes it, verification on; ``mode="max-autotune"`` measures the ways to run it, any other mode
takes the first that is right. ``options`` are arguments of ``graphopt.optimize``. What cannot be optimized
runs as it was, with one warning that says why.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.capture.dynamo import DynamoPiece
from graphopt.errors import GraphoptError, InputError, said
from graphopt.optimize import optimize
from graphopt.optimized_model import OptimizedModel

_VARIANTS = 64  # weights and numbers that one piece is optimized for
_RENEWALS = 3  # times that a piece is optimized again because its weights were written to


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend, as TorchDynamo calls it.

    Args:
        module: a piece of the model.
        example_inputs: its inputs, weights among them.
        mode: "max-autotune" measures; None and PyTorch's other modes do not.
        options: arguments of ``graphopt.optimize``.

    Returns:
        What runs in the piece's place.
    """
    if torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    ):
        _warn(
            "graphopt compiles for inference, and gradients are wanted here: the model runs as it is;"
            " call it under torch.no_grad()"
        )
        return module.forward
    effort = "measured" if mode == "max-autotune" else "fast"
    return _Piece(module, {"effort": effort, **(options or {})})


class _Piece:
    """A piece, optimized at its first call for the weights and numbers that it brings.

    Args:
        module: from Dynamo.
        options: arguments of ``graphopt.optimize``.
    """

    def __init__(self, module: fx.GraphModule, options: dict[str, Any]) -> None:
        self._piece = DynamoPiece(module)
        self._options = options
        self._variants: dict[tuple[Any, ...], _Variant] = {}
        self._renewals = 0
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        key = self._piece.key(args)
        variant = self._variants.get(key)
        if variant is None or not variant.is_current():
            return self._first(key, args)
        if variant.model is None:
            return self._piece.module(*args)
        try:
            return variant.model(*self._piece.tensors(args))
        except InputError:  # sizes outside the range that the capture found
            return self._piece.module(*args)

    def _first(self, key: tuple[Any, ...], args: Sequence[Any]) -> Any:
        """Run the piece as it is, and optimize it for the calls to come."""
        with self._lock:
            result = self._piece.module(*args)
            if key in self._variants:
                self._renewals += 1
            if len(self._variants) < _VARIANTS and self._renewals <= _RENEWALS:
                self._variants[key] = self._variant(args, result)
            elif self._renewals > _RENEWALS:
                _warn("the weights of a compiled piece change from call to call: it runs as it is")
                self._variants[key] = _Variant(None, ())
            return result

    def _variant(self, args: Sequence[Any], result: Sequence[Any]) -> _Variant:
        weights = self._piece.weights(args)
        if _shares_memory(result, args):
            _warn("a compiled piece returns a view of its input: it runs as it is")
            return _Variant(None, weights)
        tensors = self._piece.tensors(args)
        try:
            bound = self._piece.bound(args)
            with torch.no_grad():
                model = optimize(bound, tensors, dynamic=self._piece.dynamic, **self._options)
        except GraphoptError as error:
            _warn(f"graphopt leaves a piece of the model as it is: {said(error).splitlines()[0]}")
            return _Variant(None, weights)
        return _Variant(model, weights)


class _Variant:
    """An optimized piece, or None for one that runs as it is, and the state of its weights then."""

    def __init__(self, model: OptimizedModel | None, weights: Sequence[torch.Tensor]) -> None:
        self.model = model
        self._weights = weights  # held, so that nothing else gets their identity
        self._versions = [_version(weight) for weight in weights]

    def is_current(self) -> bool:
        """False when a weight was written to since: what was folded from it is out of date."""
        return self.model is None or self._versions == [_version(weight) for weight in self._weights]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shares_memory(result: Sequence[Any], args: Sequence[Any]) -> bool:
    held = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
    return any(
        isinstance(value, torch.Tensor) and value.numel() and value.untyped_storage().data_ptr() in held
        for value in result
    )


@functools.cache
def _warn(message: str) -> None:
    """Warn once a process."""
    warnings.warn(message, stacklevel=2)
