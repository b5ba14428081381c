"""The Plan: a graph cut into steps, each bound to an executor."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.runtime.executors import Program
from graphopt.runtime.memory import peak_bytes
from graphopt.runtime.region import Region
from graphopt.runtime.tokens import tokens_of


@dataclass(frozen=True)
class Step:
    """One call of one program.

    Args:
        executor: who runs it.
        region: what it computes.
        program: the compiled region.
        frees: names of values that nobody reads after this step.
        reason: why it is this executor's, in words.
        device: where it runs, and what it makes is; None for the plan's device.
    """

    executor: str
    region: Region
    program: Program
    frees: tuple[str, ...] = ()
    reason: str = ""
    device: torch.device | None = None

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run the program; an error is told which step it came from."""
        try:
            return self.program.run(inputs)
        except Exception as error:
            error.add_note(f"in step {self.region.name} of the plan, on {self.executor}")
            raise


class Runner(Protocol):
    """Runs a plan in another way than one step after the other."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """The plan's flat outputs."""


@dataclass(frozen=True)
class Plan:
    """What the scheduler runs.

    Args:
        device: where inputs and outputs are, and steps that do not say otherwise run.
        inputs: names of the tensor inputs, in calling order.
        outputs: what the model returns, in order: the name of a value, or a literal.
        constants: values that the model returns as they are.
        steps: in order.
        lanes: of each step, when they run side by side on one device: a thread on a CPU, a stream on a GPU.
        runner: runs them so; None runs them in order.
        padded: of a plan that packs tokens, what runs instead where there is nothing to gain.
    """

    device: torch.device
    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    constants: dict[str, torch.Tensor]
    steps: tuple[Step, ...]
    lanes: tuple[int, ...] = ()
    runner: Runner | None = None
    padded: Padded | None = None

    def ends(self, values: Mapping[str, Any]) -> list[Any]:
        """The flat outputs among the values that the steps made."""
        return [values[end.name] if isinstance(end, Value) else end for end in self.outputs]

    @functools.cached_property
    def places(self) -> tuple[list[int], list[int]] | None:
        """Of a plan of one step, its inputs among the plan's and the plan's outputs among its results.

        None where that is not all there is: several steps, or outputs that no step makes.
        """
        names = [end.name for end in self.outputs if isinstance(end, Value)]
        if len(self.steps) != 1 or len(names) != len(self.outputs):
            return None
        region = self.steps[0].region
        if not set(region.reads) <= set(self.inputs) or not set(names) <= set(region.writes):
            return None
        return [self.inputs.index(name) for name in region.reads], [region.writes.index(n) for n in names]

    def serving(self, inputs: Sequence[torch.Tensor]) -> Plan:
        """The plan that runs these inputs: itself, or the one that keeps the padding."""
        if self.padded is None or not self.padded.serves(inputs[self.inputs.index(self.padded.mask)]):
            return self
        return self.padded.plan

    def rows(self) -> list[dict[str, Any]]:
        """A row a step, JSON-ready; ``activation_bytes`` is the most that its values take at once."""
        rows = []
        for index, step in enumerate(self.steps):
            counts = step.region.graph.op_counts()
            rows.append(
                {
                    "step": step.region.name,
                    "executor": step.executor,
                    "reason": step.reason,
                    "device": str(step.device or self.device),
                    "nodes": len(step.region.graph.calls),
                    "ops": counts,
                    "reads": list(step.region.reads),
                    "writes": list(step.region.writes),
                    "activation_bytes": peak_bytes([step.region.graph]),
                    **({"lane": self.lanes[index]} if self.lanes else {}),
                    **step.program.describe(),
                }
            )
        return rows

    def outside_cuda_graphs(self) -> list[Step]:
        """The steps that launch their kernels one by one; known once the plan has run."""
        return [step for step in self.steps if not step.program.describe().get("graphed_nodes")]

    def __str__(self) -> str:
        lines = [f"plan on {self.device}: {len(self.steps)} steps"]
        for row in self.rows():
            most = ", ".join(f"{name} x{count}" for name, count in list(row["ops"].items())[:4])
            lines.append(f"  {row['step']:<12} {row['executor']:<8} {row['nodes']:>4} nodes  {most}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Padded:
    """A plan that computes padded positions as well, and the calls that are its own.

    They are those without much padding, and those without any token, which kernels refuse. To look at the
    mask takes some microseconds on a CPU, and waits for what is queued on a GPU: once a call, whatever else
    wants to know of its tokens.

    Args:
        plan: which keeps the padding.
        mask: name of the input that tells real tokens by what is not zero, (batch, length).
        fullest: the share of real tokens above which this plan is the faster one.
        first: also where a sequence does not begin with a token that the mask marks with 1, which the other
            plan takes for granted.
    """

    plan: Plan
    mask: str
    fullest: float
    first: bool

    def serves(self, mask: torch.Tensor) -> bool:
        """Whether a call with this mask is its own."""
        tokens = tokens_of(mask)
        if tokens.real == 0 or tokens.real >= self.fullest * mask.numel():
            return True
        return self.first and tokens.firsts < mask.shape[0]


def ends_of(graph: Graph) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    """A graph's outputs as a plan names them, and the constants among them."""
    outputs: list[Any] = []
    constants: dict[str, torch.Tensor] = {}
    results: Sequence[Any] = graph.output.args[0]  # type: ignore[assignment]
    for result in results:
        if isinstance(result, fx.Node):
            outputs.append(Value(result.name))
            if result.op == "get_attr":
                constants[result.name] = graph.constants[str(result.target)].tensor
        else:
            outputs.append(result)
    return tuple(outputs), constants


@dataclass(frozen=True)
class Value:
    """A reference to a value by name, among a plan's outputs."""

    name: str
