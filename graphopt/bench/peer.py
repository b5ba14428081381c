"""What a peer is: somebody else's way to make a model fast, in the modes that it has."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

Run = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Problem:
    """A model and the inputs that every side runs it on.

    Args:
        model: in evaluation mode, on its device and in its dtype.
        args: positional inputs.
        kwargs: keyword inputs.
        device: where all of it is.
        folder: for files that a peer has to write; removed after the case.
        precision: narrower numbers that a peer may compute in besides; "exact" for none.
        max_loss: what may be lost by it, as a relative distance of the outputs.
    """

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    folder: Path
    precision: str = "exact"
    max_loss: float = 0.0

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors among the inputs, in order."""
        return tensors((self.args, dict(self.kwargs)))

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of the first floating parameter, or input."""
        values = (*self.model.parameters(), *self.inputs)
        return next((value.dtype for value in values if value.is_floating_point()), torch.float32)

    @functools.cached_property
    def outputs(self) -> list[torch.Tensor]:
        """What the model returns."""
        return eager(self.model, self.args, self.kwargs)()


@dataclass(frozen=True)
class Mode:
    """One way to run a peer.

    Args:
        name: as it stands in the tables; "" where the peer has only one.
        build: makes the function that is timed. It may take long and may raise.
        precision: that it computes in; "exact" for the model's own.
    """

    name: str
    build: Callable[[Problem], Run]
    precision: str = "exact"

    def narrowed(self, precision: str, build: Callable[[Problem], Run]) -> Mode:
        """The same way in narrower numbers, made by another function."""
        return Mode(", ".join(filter(None, (self.name, precision))), build, precision)


@dataclass(frozen=True)
class Peer:
    """A peer.

    Args:
        name: what ``--against`` calls it.
        modes: all that are worth trying on a problem; each is measured, the best counts.
        install: the command that brings it.
        absent: why it cannot run on a device here; None when it can.
    """

    name: str
    modes: Callable[[Problem], Sequence[Mode]]
    install: str = ""
    absent: Callable[[torch.device], str | None] = lambda device: None


def eager(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """The model itself, without autograd."""

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors(model(*args, **kwargs))

    return run


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's inputs or outputs, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def installed(module: str) -> bool:
    """True when a module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None
