"""What an executor is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import fx

from graphopt.runtime.region import Region
from graphopt.runtime.target import Target


class Program(Protocol):
    """A compiled region."""

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run on tensors in the order of the region's ``reads``; returns its ``writes``."""

    def profile(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], list[KernelTime]]:
        """Run, and tell what each node took."""

    def describe(self) -> dict[str, Any]:
        """What the plan's row says of the program besides, JSON-ready; known in full once it has run."""

    def notes(self) -> list[Note]:
        """What it has to remark, once it has run."""


@runtime_checkable
class Threaded(Protocol):
    """A program with threads of its own, where others take PyTorch's."""

    def with_threads(self, threads: int) -> Program:
        """The same with so many threads at most, which begin where the caller's thread may run."""


@runtime_checkable
class Resting(Protocol):
    """A program that holds copies of weights, which it can do without until it runs."""

    def rest(self) -> None:
        """Let go of them; the next run makes them again first. Nobody may be running it."""


@dataclass(frozen=True)
class Note:
    """What a program says of a node.

    Args:
        kind: as of a remark.
        node: a call of its region.
        reason: in words.
    """

    kind: Literal["missed", "analysis"]
    node: fx.Node
    reason: str


class Silent:
    """A program that has nothing to say besides what the plan knows."""

    def describe(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def notes(self) -> list[Note]:
        """Nothing."""
        return []


@dataclass(frozen=True)
class KernelTime:
    """What one kernel took.

    Args:
        node: name of the graph node that it serves, or the executor's own name for one that it made.
        op: what ran: an ATen or ONNX op.
        ms: mean time of one call, in milliseconds.
    """

    node: str
    op: str
    ms: float


class Executor(Protocol):
    """Compiles regions into programs."""

    name: str

    def supports(self, node: fx.Node, target: Target) -> str | None:
        """Why this executor cannot take a node, or None when it can."""

    def compile(self, region: Region, target: Target, effort: str) -> Program:
        """Compile a region of supported nodes.

        Args:
            region: the region.
            target: where it is to run.
            effort: "measured" may time alternatives, "fast" times nothing.

        Raises:
            LoweringError: the region cannot be compiled after all; the next executor is asked.
        """
